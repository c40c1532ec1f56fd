"""Custom Functions without a right second derivative: an error where it matters, and no error where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import nestor

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Once(torch.autograd.Function):
    """As fused kernels are declared."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


class Numpy(torch.autograd.Function):
    """Computes outside torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(3 * ctx.x.detach().numpy() ** 2)


class Early(torch.autograd.Function):
    """Computes its gradient in the forward, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Half(torch.autograd.Function):
    """Saves an intermediate value beside its input: a part of the derivative is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, 3 * x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, triple = ctx.saved_tensors
        return g * x * triple


class Right(torch.autograd.Function):
    """Twice differentiable; saves an input, an output and a constant, one of them as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        y = scale * x**3
        ctx.save_for_backward(x, torch.full((), scale, dtype=x.dtype))
        ctx.kept = [y]
        ctx.x = x
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        return 3 * g * scale * x * ctx.x, None


class Rounded(torch.autograd.Function):
    """A straight-through estimator that clips: its derivative jumps, but torch differentiates it as it is meant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0].abs() < 1)


class Net(nn.Module):
    """An activation between two layers."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.activation(self.hidden(x)))
        return out


def weighted(net: Net, w: nestor.Variable) -> Tensor:
    return (w().exp() * (net(X) - Y).square().squeeze(1)).mean()


def shifted(net: Net, w: nestor.Variable) -> Tensor:
    return (net(X + w()[:, None]) - Y).square().mean()


def decayed(net: Net, w: nestor.Variable) -> Tensor:
    """The upper variable does not meet the activation."""
    penalty = torch.stack([p.square().sum() for p in net.parameters()]).sum()
    return (net(X) - Y).square().mean() + w().exp().mean() * penalty


def hypergradient(activation: Any, loss: Any, response: nestor.Response) -> Tensor:
    net, w = Net(activation), nestor.Variable(torch.linspace(-1, 1, 6, dtype=torch.float64))
    program = nestor.Program(
        net=nestor.Problem(
            net, loss, response=response, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), unroll_steps=3
        ),
        w=nestor.Problem(w, lambda net: net(X).mean()),
    )
    return program.hypergradient("w")["value"]


def cube(x: Tensor) -> Tensor:
    return x**3


RESPONSES = {
    "t1t2": nestor.T1T2(),
    "forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "cg": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=100, rtol=1e-12), damping=100.0),
    "dense": nestor.Implicit(solver=nestor.DenseSolve(), damping=100.0),
    "unrolled": nestor.Unrolled(),
    "unrolled-none": nestor.Unrolled(checkpoint="none"),
    "forward-unrolled": nestor.ForwardUnrolled(),
}


@pytest.mark.parametrize("function", [Once, Numpy, Early, Half])
@pytest.mark.parametrize("loss", [weighted, shifted])
@pytest.mark.parametrize("name", RESPONSES)
def test_a_lost_derivative_is_an_error(function: Any, loss: Any, name: str) -> None:
    """It names level, loss, Function and remedy, and the remedy works."""
    with pytest.raises(
        nestor.LossError, match=rf"level 'net', loss {loss.__name__} .*{function.__name__}.*FiniteDifference"
    ):
        hypergradient(function.apply, loss, RESPONSES[name])
    got = hypergradient(function.apply, loss, nestor.FiniteDifference(rel_step=1e-4))
    torch.testing.assert_close(got, hypergradient(cube, loss, nestor.T1T2()), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("function", [Once, Numpy, Early, Half])
@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_a_lost_derivative_in_an_engine(function: Any, checkpoint: str) -> None:
    """The graphs of the level's own steps are checked too."""
    net, w = Net(function.apply), nestor.Variable(torch.linspace(-1, 1, 6, dtype=torch.float64))
    sgd = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (net, w)]
    program = nestor.Program(
        net=nestor.Problem(net, weighted, response=nestor.Unrolled(checkpoint=checkpoint), optimizer=sgd[0]),
        w=nestor.Problem(w, lambda net: net(X).mean(), optimizer=sgd[1]),
    )
    with pytest.raises(nestor.LossError, match=f"level 'net', loss weighted .*{function.__name__}"):
        nestor.Engine(program, seed=0).run(2)


def test_a_lost_derivative_of_the_loss_alone() -> None:
    """Gauss-Newton differentiates the loss after the mark twice, the model before it once."""
    net, w = Net(torch.tanh), nestor.Variable(torch.linspace(-1, 1, 6, dtype=torch.float64))
    curvature = nestor.Stationarity(curvature=nestor.GaussNewton())
    response = nestor.Implicit(condition=curvature, cross=nestor.CentralDifference(), damping=1.0)

    def loss(net: Net, w: nestor.Variable) -> Tensor:
        return (w().exp() * Early.apply(nestor.outputs(net(X)) - Y).squeeze(1)).mean()

    program = nestor.Program(
        net=nestor.Problem(net, loss, response=response), w=nestor.Problem(w, lambda net: net(X).mean())
    )
    with pytest.raises(nestor.LossError, match="Early"):
        program.hypergradient("w")


@pytest.mark.parametrize("function", [Once, Numpy, Early, Half])
def test_no_error_where_nothing_is_lost(function: Any) -> None:
    """The mixed derivative of a penalty does not pass through the activation; the Hessian does."""
    got = hypergradient(function.apply, decayed, nestor.T1T2())
    torch.testing.assert_close(got, hypergradient(cube, decayed, nestor.T1T2()), rtol=1e-10, atol=1e-14)
    with pytest.raises(nestor.LossError, match=function.__name__):
        hypergradient(function.apply, decayed, RESPONSES["cg"])


@pytest.mark.filterwarnings("ignore:.*computed by:nestor.NestorWarning")
@pytest.mark.parametrize("loss", [weighted, shifted, decayed])
@pytest.mark.parametrize("name", RESPONSES)
def test_a_right_function_passes(loss: Any, name: str) -> None:
    """Every response has the value that it has for operations of torch."""
    got = hypergradient(lambda x: Right.apply(x, 1.0), loss, RESPONSES[name])
    torch.testing.assert_close(got, hypergradient(cube, loss, RESPONSES[name]), rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*computed by:nestor.NestorWarning")
@pytest.mark.parametrize("loss", [weighted, shifted, decayed])
@pytest.mark.parametrize("name", RESPONSES)
def test_a_straight_through_estimator_passes(loss: Any, name: str) -> None:
    """Its value is that of the usual way to write it: a detached difference."""

    def written(x: Tensor) -> Tensor:
        clipped = x.clamp(-1, 1)
        return clipped + ((8 * x).round() / 8 - clipped).detach()

    got = hypergradient(lambda x: Right.apply(Rounded.apply(x), 1.0), loss, RESPONSES[name])
    wanted = hypergradient(lambda x: cube(written(x)), loss, RESPONSES[name])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)


def test_torch_has_such_functions_too() -> None:
    """Samples of a Dirichlet distribution, for one."""

    def sampled(net: Net, w: nestor.Variable) -> Tensor:
        shares = torch.distributions.Dirichlet(net(X).exp().squeeze(1)).rsample()
        return (w() * shares.square()).sum()

    with pytest.raises(nestor.LossError, match="Dirichlet"):
        hypergradient(torch.tanh, sampled, nestor.T1T2())


def test_forward_mode_is_compared_where_there_is_a_custom_function() -> None:
    """Reverse mode decides, as in the level's own steps."""

    class Wrong(Right):
        """Its forward-mode rule is not that of its backward."""

        @staticmethod
        def jvp(ctx: Any, direction: Tensor, scale: None) -> Tensor:
            return 2 * direction

    with pytest.warns(nestor.NestorWarning, match="rules of a custom Function disagree"):
        got = hypergradient(lambda x: Wrong.apply(x, 1.0), shifted, RESPONSES["forward"])
    torch.testing.assert_close(got, hypergradient(cube, shifted, nestor.T1T2()), rtol=1e-10, atol=1e-14)
