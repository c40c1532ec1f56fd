"""Operations that lack a derivative: another method with the same result, or an error that names a remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Cube(torch.autograd.Function):
    """Twice differentiable, without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


class Net(nn.Module):
    """A hidden layer of any size, and an activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor], hidden: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(5, hidden).double(), nn.Linear(hidden, 1).double()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.activation(self.hidden(x)))
        return out


def train(net: Net, weights: nestor.Variable) -> Tensor:
    return (weights().sigmoid() * (net(X) - Y).square().squeeze(1)).mean() + 0.1 * sum(
        p.square().sum() for p in net.parameters()
    )


def valid(net: Net) -> Tensor:
    return F.mse_loss(net(X), -Y)


def program(net: nn.Module, response: nestor.Response | None, loss: Any = train, upper: Any = valid) -> nestor.Program:
    weights = nestor.Variable(torch.linspace(-1, 1, 6, dtype=torch.float64))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    return nestor.Program(
        net=nestor.Problem(net, loss, optimizer=sgd, response=response, unroll_steps=3),
        weights=nestor.Problem(weights, upper, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1)),
    )


def hypergradient(*arguments: Any) -> Tensor:
    return program(*arguments).hypergradient("weights")["value"]


CG = nestor.ConjugateGradient(max_steps=200, rtol=1e-12)
RESPONSES: dict[str, nestor.Response] = {
    "t1t2": nestor.T1T2(),
    "t1t2-forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "cg": nestor.Implicit(solver=CG, damping=50.0),
    "cg-forward": nestor.Implicit(solver=CG, damping=50.0, cross=nestor.ForwardMode()),
    "neumann": nestor.Implicit(solver=nestor.Neumann(step_size=0.1)),
    "gmres": nestor.Implicit(solver=nestor.GMRES(max_steps=30, rtol=1e-12), damping=50.0),
    "dense": nestor.Implicit(solver=nestor.DenseSolve(), damping=50.0),
    "sama-forward": nestor.SAMA(cross=nestor.ForwardMode()),
    "unrolled": nestor.Unrolled(),
    "unrolled-none": nestor.Unrolled(checkpoint="none"),
    "unrolled-tree": nestor.Unrolled(checkpoint="tree"),
    "forward-unrolled": nestor.ForwardUnrolled(),
}
DIFFERENCES = {"finite-difference": nestor.FiniteDifference(), "sama": nestor.SAMA()}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_function_without_a_forward_mode_rule(name: str) -> None:
    """Every response has the value that it has for the same operation of torch, with at most one warning."""
    wanted = hypergradient(Net(lambda h: h**3), RESPONSES[name])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tried = program(Net(Cube.apply), RESPONSES[name])
        values = [tried.hypergradient("weights")["value"] for _ in range(2)]
    for value in values:
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-14)
    texts = [str(warning.message) for warning in told]
    if "forward" in name:
        instead = "response=Unrolled(checkpoint='tree')" if name == "forward-unrolled" else "cross=ReverseMode()"
        (text,) = texts
        assert "Level 'net', loss train (" in text
        assert "jvp" in text
        assert f"set {instead} to silence" in text
    else:
        assert texts == []


def test_an_engine_warns_once() -> None:
    """A run of several upper steps warns at the first, and takes the steps of reverse mode."""
    nets = [Net(Cube.apply), Net(Cube.apply)]
    nestor.Engine(program(nets[0], nestor.T1T2(cross=nestor.ReverseMode())), seed=0).run(9)
    with pytest.warns(nestor.NestorWarning, match=r"ReverseMode\(\), not ForwardMode\(\)") as told:
        nestor.Engine(program(nets[1], nestor.T1T2(cross=nestor.ForwardMode())), seed=0).run(9)
    assert len(told) == 1
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def distances(net: Net, weights: nestor.Variable) -> Tensor:
    """Torch has no second derivative of cdist."""
    return (weights().sigmoid() * torch.cdist(net(X), Y).sum(1)).mean()


@pytest.mark.parametrize("name", RESPONSES)
def test_no_second_derivative(name: str) -> None:
    """The error names level, loss, operation and remedy."""
    with pytest.raises(
        nestor.LossError, match=r"level 'net', loss distances .*'_cdist_backward'.*FiniteDifference\(\)"
    ):
        hypergradient(Net(torch.tanh), RESPONSES[name], distances)


@pytest.mark.parametrize("name", RESPONSES)
def test_no_second_derivative_in_an_engine(name: str) -> None:
    """The same in a run."""
    with pytest.raises(nestor.LossError, match=r"level 'net', loss distances .*FiniteDifference\(\)"):
        nestor.Engine(program(Net(torch.tanh), RESPONSES[name], distances), seed=0).run(4)


class Outside(Cube):
    """Its backward cannot be evaluated with a graph."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(3 * ctx.saved_tensors[0].numpy() ** 2)


@pytest.mark.parametrize("name", RESPONSES)
def test_a_backward_that_fails_with_a_graph(name: str) -> None:
    """The first derivative works, so it is not the loss that fails, in a run and by hand."""
    for call in (lambda p: p.hypergradient("weights"), lambda p: nestor.Engine(p, seed=0).run(4)):
        with pytest.raises(nestor.LossError, match=r"level 'net', loss train .*numpy.*FiniteDifference\(\)"):
            call(program(Net(Outside.apply), RESPONSES[name]))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_need_no_second_derivative(name: str) -> None:
    """The remedy works: the value is that of distances by elementary operations, whose second derivatives exist."""

    def elementary(net: Net, weights: nestor.Variable) -> Tensor:
        return (weights().sigmoid() * (net(X) - Y.T).abs().sum(1)).mean()

    got = hypergradient(Net(torch.tanh), DIFFERENCES[name], distances)
    exact = nestor.T1T2() if name == "finite-difference" else nestor.SAMA(cross=nestor.ReverseMode())
    torch.testing.assert_close(got, hypergradient(Net(torch.tanh), exact, elementary), rtol=1e-3, atol=1e-6)


def test_the_diagnostics_name_it() -> None:
    """A response that fails in a comparison shows why; ``explain`` does not evaluate the loss."""
    tried = program(Net(torch.tanh), None, distances)
    trusted = nestor.FiniteDifference()
    table = nestor.diagnostics.check_hypergradient(tried, "weights", responses=[nestor.T1T2()], reference=trusted)
    assert "FiniteDifference()" in table.trials[0].failure
    assert "net" in str(tried.explain())
    with pytest.raises(nestor.LossError, match=r"level 'net', loss distances .*FiniteDifference\(\)"):
        tried.explain({})
    with pytest.raises(nestor.NestorError, match=r"memory cannot be forecast: .*numpy"):
        program(Net(Outside.apply), None).explain({})


def wrong_shapes(net: Net, weights: nestor.Variable) -> Tensor:
    return (weights().sigmoid() * (net(X) @ X)).mean()


def mistaken(net: Net, weights: nestor.Variable) -> Tensor:
    raise TypeError("a mistake in the loss")


@pytest.mark.parametrize("name", [*RESPONSES, *DIFFERENCES])
@pytest.mark.parametrize(("loss", "text"), [(wrong_shapes, "shapes"), (mistaken, "a mistake")])
def test_an_error_of_the_loss_is_its_own(name: str, loss: Any, text: str) -> None:
    """It is not taken for a missing derivative: it surfaces as it is, without a warning."""
    with pytest.raises((RuntimeError, TypeError), match=text) as caught:
        hypergradient(Net(torch.tanh), {**RESPONSES, **DIFFERENCES}[name], loss)
    assert not isinstance(caught.value, nestor.NestorError)


def test_a_derivative_of_zero_is_confirmed_once() -> None:
    """A gradient without a tangent is compared with reverse mode at the first response, and not again."""

    def apart(net: Net, weights: nestor.Variable) -> Tensor:
        return net(X).square().mean() + weights().square().sum()

    def upper(net: Net, weights: nestor.Variable) -> Tensor:
        return valid(net) + weights().sum()

    tried = program(Net(torch.tanh), nestor.T1T2(cross=nestor.ForwardMode()), apart, upper)
    for forwards in (3, 2):
        with nestor.diagnostics.count_evaluations(tried) as count:
            assert tried.hypergradient("weights")["value"].tolist() == [1.0] * 6
        assert sum(count.forwards.values()) == forwards


@pytest.mark.parametrize("response", [nestor.T1T2(cross=nestor.ForwardMode()), nestor.ForwardUnrolled()])
def test_no_grad_inside_a_loss(response: nestor.Response) -> None:
    """Forward mode through the steps respects ``no_grad`` as reverse mode does."""

    def partly(net: Net, weights: nestor.Variable) -> Tensor:
        with torch.no_grad():
            scale = net(X).square().mean() * weights().sum().exp()
        return scale * train(net, weights)

    unrolled = nestor.Unrolled() if isinstance(response, nestor.ForwardUnrolled) else nestor.T1T2()
    wanted = hypergradient(Net(torch.tanh), unrolled, partly)
    torch.testing.assert_close(hypergradient(Net(torch.tanh), response, partly), wanted, rtol=1e-10, atol=1e-14)


GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])


def products(h: Tensor) -> Tensor:
    """The product of the rows of each group and one more, by an operation whose forward mode is wrong in torch 2.13."""
    index = GROUPS[:, None].expand_as(h)
    return h[:3].scatter_reduce(0, index, h, "prod")[GROUPS]


def products_one_by_one(h: Tensor) -> Tensor:
    return (h[:3] * torch.stack([h[group == GROUPS].prod(0) for group in range(3)]))[GROUPS]


def inside(net: Net, weights: nestor.Variable) -> Tensor:
    """Variables and weights meet inside of the product, and elsewhere: a part of the tangents would be left out."""
    scale = weights().sigmoid().unsqueeze(1)
    out, other = net(X * scale), net.head(net.hidden(X) * scale)
    return (out + other - Y).square().mean() + 0.1 * sum(p.square().sum() for p in net.parameters())


@pytest.mark.parametrize("loss", [train, inside])
@pytest.mark.parametrize("name", RESPONSES)
def test_an_operation_whose_forward_mode_is_wrong(name: str, loss: Any) -> None:
    wanted = hypergradient(Net(products_one_by_one), RESPONSES[name], loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)
        tried = program(Net(products), RESPONSES[name], loss)
        for _ in range(2):
            torch.testing.assert_close(tried.hypergradient("weights")["value"], wanted, rtol=1e-9, atol=1e-14)
