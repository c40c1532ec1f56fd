"""Integers, booleans and complex numbers among the arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestor


@pytest.mark.parametrize(
    "response",
    [
        nestor.T1T2(),
        nestor.T1T2(cross=nestor.ForwardMode()),
        nestor.Implicit(),
        nestor.FiniteDifference(),
        nestor.SAMA(),
        nestor.Unrolled(steps=2),
        nestor.ForwardUnrolled(),
        nestor.EvolutionStrategies(samples=2),
    ],
    ids=lambda response: response.describe(),
)
def test_constants_of_best_response(response: nestor.Response) -> None:
    """Labels, a mask and data among the inputs: the derivative is that of an objective that closes over them."""
    data, labels, mask = torch.randn(10, 3), torch.randint(2, (10,)), torch.rand(10) > 0.3
    scale, start = torch.tensor(0.1, requires_grad=True), torch.randn(3, 2)

    def objective(theta: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        scale, data, labels, mask = inputs
        return (F.cross_entropy(data @ theta, labels, reduction="none") * mask).mean() + scale * theta.pow(2).sum()

    def derivative(function: object, inputs: object) -> Tensor:
        theta = start.clone()
        optimizer = torch.optim.SGD([theta], lr=0.1)
        torch.manual_seed(1)
        found = nestor.best_response(function, theta, inputs, response, optimizer=optimizer)
        return torch.autograd.grad(found.pow(2).sum(), scale)[0]

    got = derivative(objective, (scale, data, labels, mask))
    expected = derivative(lambda theta, scale: objective(theta, (scale, data, labels, mask)), scale)
    assert got != 0
    torch.testing.assert_close(got, expected)


def test_constants_of_root() -> None:
    """No gradient for a constant, in a first and in a second derivative; ``t = s * a[i]``."""
    scale, index, mask = torch.tensor(2.0, requires_grad=True), torch.tensor([2, 0]), torch.tensor([True, False])
    table = torch.randn(3, requires_grad=True)

    def residual(t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return t - torch.where(inputs["mask"], inputs["scale"] ** 2 * inputs["table"][inputs["index"]], 0.0)

    inputs = {"scale": scale, "index": index, "mask": mask, "table": table}
    found = nestor.root(residual, torch.stack([4 * table[2], torch.zeros(())]), inputs)
    first = torch.autograd.grad(found.sum(), (scale, table), create_graph=True)
    torch.testing.assert_close(first[0], 4 * table[2])
    torch.testing.assert_close(first[1], torch.tensor([0.0, 0.0, 4.0]))
    torch.testing.assert_close(torch.autograd.grad(first[0], scale)[0], 2 * table[2].detach())


def test_data_that_changes_before_the_reverse_pass() -> None:
    """The derivative would be that of other data: torch's error."""
    data, scale = torch.randn(3), torch.tensor(2.0, requires_grad=True)
    found = nestor.root(lambda t, inputs: t - inputs[0] * inputs[1], 2 * data, (scale, data))
    data.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


SOLVERS = [
    None,
    nestor.DenseSolve(),
    nestor.BiCGSTAB(max_steps=50, rtol=1e-12),
    nestor.NormalConjugateGradient(max_steps=50, rtol=1e-12),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_complex_root(solver: nestor.LinearSolver | None) -> None:
    """``a x = 1``: the derivative of ``1 / a``, in a real function of it."""
    a = torch.tensor([1 + 1j, 2 - 1j], requires_grad=True)
    found = nestor.root(lambda x, a: a * x - 1, (1 / a).detach(), a, solver)
    assert found.dtype == torch.complex128
    for part in (lambda x: x.real.sum(), lambda x: x.abs().pow(2).sum(), lambda x: (x.real * x.imag).sum()):
        expected = torch.autograd.grad(part(1 / a), a)[0]
        torch.testing.assert_close(torch.autograd.grad(part(found), a, retain_graph=True)[0], expected)


@pytest.mark.parametrize(
    "solver", [nestor.DenseSolve(), nestor.ConjugateGradient(), nestor.MINRES()], ids=lambda s: type(s).__name__
)
def test_complex_best_response(solver: nestor.LinearSolver) -> None:
    """A Hessian that is linear over the real numbers only: ``t = Re w / 2 + i Im w``."""
    w = torch.tensor([1 + 2j], requires_grad=True)

    def objective(t: Tensor, w: Tensor) -> Tensor:
        return (t - w).abs().pow(2).sum() + t.real.pow(2).sum()

    found = nestor.best_response(objective, torch.tensor([0.5 + 2j]), w, nestor.Implicit(solver=solver))
    for part in (lambda t: t.real.sum(), lambda t: t.imag.sum()):
        expected = torch.autograd.grad(part(torch.complex(w.real / 2, w.imag)), w)[0]
        torch.testing.assert_close(torch.autograd.grad(part(found), w, retain_graph=True)[0], expected)


def test_complex_and_an_optimizer() -> None:
    theta, w = torch.tensor([0.5 + 2j]), torch.tensor([1 + 2j], requires_grad=True)
    with pytest.raises(nestor.UnsupportedError, match="view_as_real"):
        nestor.best_response(lambda t, w: (t - w).abs().sum(), theta, w, optimizer=torch.optim.SGD([theta], lr=0.1))


def test_refusals() -> None:
    """Each names the argument."""
    a = torch.tensor(1.0, requires_grad=True)

    def objective(t: Tensor, a: Tensor) -> Tensor:
        return (t - a).pow(2).sum()

    with pytest.raises(TypeError, match=r"theta holds a tensor of torch.int64"):
        nestor.best_response(objective, torch.tensor(1), a)
    with pytest.raises(TypeError, match=r"residual=3\) must be callable"):
        nestor.root(3, torch.tensor(1.0), a)
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        nestor.best_response(objective, torch.tensor(1.0), (a, 2.0))
    with pytest.raises(TypeError, match="theta"):
        nestor.fixed_point(objective, None, a)
    for bad, found in (
        (lambda t, a: 1.0, "float"),
        (lambda t, a: t - a, r"\(2,\)"),
        (lambda t, a: (t * 1j).sum(), "complex"),
    ):
        with pytest.raises(nestor.LossError, match=found):
            nestor.best_response(bad, torch.ones(2), a).sum().backward()
    with pytest.raises(nestor.LossError, match="no graph"):
        nestor.best_response(lambda t, a: objective(t, a).detach(), torch.ones(2), a).sum().backward()
