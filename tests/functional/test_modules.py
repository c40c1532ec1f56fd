"""A module as the function: its parameters are inputs, and it is left as it was."""

import pytest
import torch
import torch.nn.functional as F
from cells import Cell, dense_pull_back, iterate
from torch import Tensor, nn

import nestor


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def test_fixed_point() -> None:
    """Gradients of x and of every parameter equal the dense formula; no buffer and no parameter changes."""
    cell, x, cotangent = Cell(), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    with torch.no_grad():
        z = iterate(cell, torch.zeros(4, 3), x)
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    found = nestor.fixed_point(cell, z, x, nestor.GMRES(rtol=1e-12))
    assert torch.equal(found, z)
    found.backward(cotangent)
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())
    assert cell.frozen.grad is None
    wrt = [x, *trained(cell)]
    expected = dense_pull_back(lambda z: z - cell(z, x), z, wrt, cotangent)
    torch.testing.assert_close([t.grad for t in wrt], expected, rtol=1e-7, atol=1e-9)


def test_parameters_train_without_inputs_that_require_gradients() -> None:
    cell, x = Cell(), torch.randn(4, 3)
    with torch.no_grad():
        z = iterate(cell, torch.zeros(4, 3), x)
    found = torch.autograd.grad(nestor.fixed_point(cell, z, x, nestor.DenseSolve()).sum(), trained(cell))
    expected = dense_pull_back(lambda z: z - cell(z, x), z, trained(cell), torch.ones(4, 3))
    torch.testing.assert_close(list(found), expected, rtol=1e-7, atol=1e-9)


def test_root_and_second_derivative() -> None:
    """A module residual; the second derivative is that of the iterations' graph."""

    class Equations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z - self.cell(z, x)

    module, x = Equations(), torch.randn(3, requires_grad=True)
    wrt = [x, *trained(module)]
    with torch.no_grad():
        z = iterate(module.cell, torch.zeros(3), x)

    def derivatives(z: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(z.pow(2).sum(), wrt, create_graph=True)
        return [*first, *torch.autograd.grad(sum(f.pow(2).sum() for f in first), wrt)]

    found = derivatives(nestor.root(module, z, x, nestor.DenseSolve()))
    expected = derivatives(iterate(module.cell, torch.zeros(3), x))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "response",
    [nestor.Implicit(solver=nestor.DenseSolve()), nestor.Implicit(solver=nestor.ConjugateGradient(rtol=1e-13))],
    ids=lambda response: type(response.solver).__name__,
)
def test_best_response(response: nestor.Response) -> None:
    """A module objective with a tied parameter: ``t = exp(log_scale) * shift(x)``."""

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.log_scale = nn.Parameter(torch.zeros(3))

        def target(self, x: Tensor) -> Tensor:
            return self.log_scale.exp() * self.second(torch.tanh(self.first(x)))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return (t - self.target(x)).pow(2).sum()

    module, x = Objective(), torch.randn(3, requires_grad=True)
    wrt = [x, *module.parameters()]
    cotangent = torch.randn(3)
    expected = torch.autograd.grad(module.target(x), wrt, cotangent)
    found = nestor.best_response(module, module.target(x).detach(), x, response)
    torch.testing.assert_close(torch.autograd.grad(found, wrt, cotangent), expected, rtol=1e-9, atol=1e-11)


def test_modules_that_change_their_buffers() -> None:
    """BatchNorm in training mode: the running statistics move by the user's own calls only."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.norm = Cell(), nn.BatchNorm1d(3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.2 * self.norm(z) + x)

    module, x = Normed(), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        z = iterate(module, torch.randn(5, 3), x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wrt = [x, *module.norm.parameters()]
    found = torch.autograd.grad(nestor.fixed_point(module, z, x).pow(3).sum(), wrt)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    expected = dense_pull_back(lambda z: z - module(z, x), z, wrt, 3 * z**2)
    torch.testing.assert_close(list(found), expected, rtol=1e-6, atol=1e-8)


class Equilibrium(nn.Module):
    """A classifier with a deep equilibrium layer; ``unrolled`` differentiates the iterations instead."""

    def __init__(self, *, unrolled: bool = False) -> None:
        super().__init__()
        self.encoder, self.cell, self.head = nn.Linear(4, 3), Cell(), nn.Linear(3, 2)
        self.unrolled = unrolled

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        if self.unrolled:
            return self.head(iterate(self.cell, torch.zeros(len(x), 3), x, 60))
        with torch.no_grad():
            z = iterate(self.cell, torch.zeros(len(x), 3), x, 60)
        return self.head(nestor.fixed_point(self.cell, z, x, nestor.GMRES(rtol=1e-12)))


@pytest.mark.parametrize(
    "response",
    [
        nestor.T1T2(),
        nestor.T1T2(cross=nestor.ForwardMode()),
        nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5), damping=1.0),
        nestor.Unrolled(),
        nestor.SAMA(),
    ],
    ids=lambda response: response.describe(),
)
def test_within_a_program(response: nestor.Response) -> None:
    """A level whose model contains the layer: the hypergradient is that of the unrolled layer."""
    batch, labels, held = torch.randn(6, 4), torch.randint(2, (6,)), torch.randn(6, 4)

    def hypergradient(*, unrolled: bool) -> Tensor:
        torch.manual_seed(1)
        net, weights = Equilibrium(unrolled=unrolled), nestor.Variable(torch.zeros(6))

        def lower(net: nn.Module, weights: nn.Module) -> Tensor:
            losses = F.cross_entropy(net(batch), labels, reduction="none")
            return (torch.sigmoid(weights()) * losses).mean() + 0.1 * sum(p.pow(2).sum() for p in net.parameters())

        def upper(net: nn.Module) -> Tensor:
            return F.cross_entropy(net(held), labels)

        program = nestor.Program(
            net=nestor.Problem(
                net, lower, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), response=response, unroll_steps=2
            ),
            weights=nestor.Problem(weights, upper, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1)),
        )
        return program.hypergradient("weights")["value"]

    expected = hypergradient(unrolled=True)
    assert expected.norm() > 1e-4
    torch.testing.assert_close(hypergradient(unrolled=False), expected, rtol=1e-6, atol=1e-9)
