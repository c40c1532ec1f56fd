"""Kinds of losses: what users write between the model and the scalar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kinds import MLP
from setups import SAMPLES, AfterStep, Setup, weighted
from torch import Tensor, nn
from torch.func import functional_call


def functional_call_inside() -> Setup:
    """`torch.func.functional_call` inside the loss"""

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        shrunk = {name: 0.9 * p for name, p in net.named_parameters()}
        return weighted(functional_call(net, shrunk, (batch[0],)), batch, w())

    class Twin(MLP):
        def forward(self, x: Tensor) -> Tensor:
            parts = [(0.9 * layer.weight, 0.9 * layer.bias) for layer in (self.first, self.second)]
            (a, b), (c, d) = parts
            return torch.tanh(x @ a.T + b) @ c.T + d

    return Setup(
        MLP(),
        Twin(),
        loss=loss,
        upper=lambda batch, net: (
            (functional_call(net, {n: 0.9 * p for n, p in net.named_parameters()}, (batch[0],)) - batch[1])
            .square()
            .mean()
        ),
    )


def gradient_penalty() -> Setup:
    """A gradient penalty: `torch.autograd.grad` inside the loss"""

    def penalty(call: Callable[..., Any], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    return Setup(
        MLP(),
        loss=lambda batch, net, w: weighted(net(batch[0]), batch, w()) + 0.1 * penalty(net, batch[0]) * w().exp().sum(),
        plain=lambda call, batch, w, step: (
            weighted(call(batch[0]), batch, w) + 0.1 * penalty(call, batch[0]) * w.exp().sum()
        ),
    )


def in_place() -> Setup:
    """Operations in place"""

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        out = net(batch[0])
        out -= batch[1]
        squares = out.square().squeeze(1)
        squares *= torch.sigmoid(w())[batch[2]]
        total = torch.zeros(len(squares), dtype=squares.dtype)
        total[:] = squares
        return total.mean()

    return Setup(MLP(), loss=loss)


def no_grad_island() -> Setup:
    """A factor under `torch.no_grad()`"""

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        out = net(batch[0])
        with torch.no_grad():
            scale = 1 + out.abs().mean()
        return weighted(out, batch, w()) / scale

    return Setup(
        MLP(),
        loss=loss,
        plain=lambda call, batch, w, step: (
            weighted(call(batch[0]), batch, w) / (1 + call(batch[0]).abs().mean()).detach()
        ),
    )


def metrics() -> Setup:
    """A loss that returns metrics, some by `.item()`"""

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> dict[str, Any]:
        out = net(batch[0])
        return {"loss": weighted(out, batch, w()), "bias": (out - batch[1]).mean(), "largest": out.max().item()}

    return Setup(MLP(), loss=loss)


def assigned_data() -> Setup:
    """A loss that assigns to `.data` of a parameter"""

    def loss(batch: Any, net: Any, w: nn.Module) -> Tensor:
        net.first.weight.data.clamp_(-0.1, 0.1)
        return weighted(net(batch[0]), batch, w())

    return Setup(MLP(), loss=loss)


def replaced_data() -> Setup:
    """A loss that replaces `.data` of a parameter"""

    def loss(batch: Any, net: Any, w: nn.Module) -> Tensor:
        net.first.weight.data = net.first.weight.data.clamp(-0.1, 0.1)
        return weighted(net(batch[0]), batch, w())

    return Setup(MLP(), loss=loss)


def sum_of_rows() -> Setup:
    """A loss that is a sum over rows (with two processes, the mean of two sums)"""

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        return 0.2 * (torch.sigmoid(w())[batch[2]] * (net(batch[0]) - batch[1]).square().squeeze(1)).sum()

    return Setup(
        MLP(),
        loss=loss,
        plain=lambda call, batch, w, step: (
            0.2 * (torch.sigmoid(w)[batch[2]] * (call(batch[0]) - batch[1]).square().squeeze(1)).sum()
        ),
    )


def outside_tensor() -> Setup:
    """A tensor from outside of the arguments, which a callback moves"""
    scale = torch.ones((), dtype=torch.float64)
    seen = [scale.clone()]

    def move() -> None:
        scale.mul_(0.7)
        seen.append(scale.clone())

    return Setup(
        MLP(),
        loss=lambda batch, net, w: weighted(net(batch[0]), batch, w()) * scale,
        plain=lambda call, batch, w, step: weighted(call(batch[0]), batch, w) * seen[step],
        callbacks=[AfterStep(move)],
    )


def replaced_tensor() -> Setup:
    """An attribute of the module that a callback replaces by another tensor"""
    net: Any = MLP()
    net.scale = torch.ones((), dtype=torch.float64)
    seen = [net.scale]

    def move() -> None:
        net.scale = 0.7 * net.scale
        seen.append(net.scale)

    return Setup(
        net,
        loss=lambda batch, net, w: weighted(net(batch[0]), batch, w()) * net.scale,
        plain=lambda call, batch, w, step: weighted(call(batch[0]), batch, w) * seen[step],
        callbacks=[AfterStep(move)],
    )


def own_average() -> Setup:
    """A loss with an average of its own that each call moves (a baseline)"""
    mean = [torch.zeros((), dtype=torch.float64)]

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        out = net(batch[0])
        mean[0] = 0.9 * mean[0] + 0.1 * out.detach().mean()
        return weighted(out - mean[0], batch, w())

    return Setup(MLP(), loss=loss)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ctx.slope = 1 - out**2
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.slope


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.mask, ctx.factor = (x > 0).to(x), factor
        return factor * x * ctx.mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.mask * ctx.factor, None


def tensor_on_context() -> Setup:
    """A custom `Function` that keeps a tensor on `ctx`, not by `save_for_backward`"""

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return _Slope.apply(self.first(x))

    return Setup(Net(), MLP())


def mask_on_context() -> Setup:
    """A custom `Function` that keeps a mask and a constant on `ctx`"""

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh(_Mask.apply(self.first(x), torch.tensor(0.5, dtype=torch.float64)))

    class Twin(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * torch.relu(self.first(x)))

    return Setup(Net(), Twin())


def one_module() -> Setup:
    """Two levels whose variables are parts of one module"""

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.linspace(-0.5, 0.5, SAMPLES).double())

    net = Net()
    return Setup(
        net,
        MLP(),
        loss=lambda batch, net, w: weighted(net(batch[0]), batch, w.weights),
        shared="weights",
    )


LOSSES: dict[str, Callable[[], Setup]] = {
    make.__name__: make
    for make in (
        functional_call_inside,
        gradient_penalty,
        in_place,
        no_grad_island,
        metrics,
        assigned_data,
        replaced_data,
        sum_of_rows,
        outside_tensor,
        replaced_tensor,
        own_average,
        tensor_on_context,
        mask_on_context,
        one_module,
    )
}
