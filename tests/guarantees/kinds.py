"""Kinds of programs that people write, each with the plain loss that it means."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from setups import AfterStep, Setup, tokens, weighted
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from truth import MOMENTUM, RATE


class MLP(nn.Module):
    """Two layers; ``hidden`` may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.hidden(x))


def plain() -> Setup:
    """A perceptron."""
    return Setup(MLP())


def activation_checkpointing() -> Setup:
    """`checkpoint(use_reentrant=False)`"""

    class Net(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.hidden, x, use_reentrant=False))

    return Setup(Net(), MLP())


def reentrant_checkpointing() -> Setup:
    """`checkpoint(use_reentrant=True)`"""

    class Net(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.hidden, x.requires_grad_(), use_reentrant=True))

    return Setup(Net(), MLP())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * (1 - out**2)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2)


def _with_function(function: type[torch.autograd.Function]) -> Setup:
    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return function.apply(self.first(x))

    return Setup(Net(), MLP())


def once_differentiable_function() -> Setup:
    """A custom `Function` with `once_differentiable`"""
    return _with_function(_Once)


def function_without_jvp() -> Setup:
    """A custom `Function` without `jvp`"""
    return _with_function(_Twice)


def _with_masks(draw: Callable[[int], Tensor]) -> Setup:
    latest: list[Tensor] = []
    seen: list[Tensor] = []

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        mask = draw(len(batch[1]))
        latest[:] = [mask]
        return weighted(net(batch[0]) * mask, batch, w())

    return Setup(
        MLP(),
        loss=loss,
        plain=lambda call, batch, w, step: weighted(call(batch[0]) * seen[min(step, len(seen) - 1)], batch, w),
        callbacks=[AfterStep(lambda: seen.extend(latest))],
        record=seen,
    )


def numbers_of_torch() -> Setup:
    """Random numbers of torch's default generator"""
    return _with_masks(lambda rows: torch.rand(rows, 1).double())


def numbers_of_numpy() -> Setup:
    """Random numbers of `numpy.random`"""
    return _with_masks(lambda rows: torch.as_tensor(np.random.rand(rows, 1)))  # noqa: NPY002


def numbers_of_python() -> Setup:
    """Random numbers of `random`"""
    return _with_masks(lambda rows: torch.tensor([[random.random()] for _ in range(rows)]).double())


def numbers_of_an_own_generator() -> Setup:
    """Random numbers of a `torch.Generator` of one's own"""
    generator = torch.Generator().manual_seed(0)
    return _with_masks(lambda rows: torch.rand(rows, 1, generator=generator).double())


def parameter_hook() -> Setup:
    """`parameter.register_hook`"""
    return Setup(MLP(), prepare=lambda net, o: net.first.weight.register_hook(lambda grad: 0.5 * grad))


def _halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def post_accumulate_hook() -> Setup:
    """`register_post_accumulate_grad_hook`"""
    return Setup(MLP(), prepare=lambda net, o: net.first.weight.register_post_accumulate_grad_hook(_halve))


def _each(optimizer: torch.optim.Optimizer, change: Callable[[Tensor], Any]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            change(parameter)


def optimizer_pre_hook() -> Setup:
    """`optimizer.register_step_pre_hook`"""
    return Setup(
        MLP(), prepare=lambda net, o: o.register_step_pre_hook(lambda optimizer, a, k: _each(optimizer, _halve))
    )


def optimizer_post_hook() -> Setup:
    """`optimizer.register_step_post_hook`"""
    return Setup(
        MLP(),
        prepare=lambda net, o: o.register_step_post_hook(
            lambda optimizer, a, k: _each(optimizer, lambda p: p.data.clamp_(-0.2, 0.2))
        ),
    )


def projection() -> Setup:
    """A callback that projects the variables"""
    net = MLP()
    return Setup(net, callbacks=[AfterStep(lambda: [p.clamp_(-0.2, 0.2) for p in net.parameters()])])


def teacher() -> Setup:
    """A frozen teacher that follows by a moving average"""

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(3, 1).double().requires_grad_(False)

    net = Net()
    weights = [net.teacher.weight.detach().clone()]

    def follow() -> None:
        net.teacher.weight.mul_(0.7)
        weights.append(net.teacher.weight.clone())

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        return weighted(net(batch[0]), (batch[0], net.teacher(batch[0]), batch[2]), w())

    bias = net.teacher.bias.clone()
    return Setup(
        net,
        MLP(),
        loss=loss,
        plain=lambda call, batch, w, step: weighted(
            call(batch[0]), (batch[0], F.linear(batch[0], weights[step], bias), batch[2]), w
        ),
        callbacks=[AfterStep(follow)],
    )


def clock() -> Setup:
    """A Python counter that the loss reads"""
    ticks = [0]

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        return weighted(net(batch[0]), batch, w()) / (1 + ticks[0])

    def tick() -> None:
        ticks[0] += 1

    return Setup(
        MLP(),
        loss=loss,
        plain=lambda call, batch, w, step: weighted(call(batch[0]), batch, w) / (1 + step),
        callbacks=[AfterStep(tick)],
    )


def step_argument() -> Setup:
    """The argument `step` of the loss"""

    def loss(batch: Any, net: nn.Module, w: nn.Module, step: int) -> Tensor:
        return weighted(net(batch[0]), batch, w()) / (1 + step)

    return Setup(MLP(), loss=loss, plain=lambda call, batch, w, step: weighted(call(batch[0]), batch, w) / (1 + step))


class Scaled(torch.optim.SGD):
    """Plain SGD with an attribute of its own."""

    def __init__(self, params: Any, factor: float) -> None:
        super().__init__(params, lr=RATE / factor, momentum=MOMENTUM)
        self.factor = factor

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    before = state.get("momentum_buffer")
                    grad = parameter.grad
                    state["momentum_buffer"] = grad.clone() if before is None else MOMENTUM * before + grad
                    parameter.data = parameter.data - group["lr"] * self.factor * state["momentum_buffer"]


def optimizer_attribute() -> Setup:
    """An optimizer with attributes of its own, not differentiable"""
    return Setup(MLP(), make=lambda net: Scaled(net.parameters(), 0.25))


def complex_parameters() -> Setup:
    """Complex parameters"""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 1, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.weight).abs().square()

    return Setup(Net())


class Words(nn.Module):
    """The mean of embedded words, with a decoder that shares the embedding."""

    def __init__(self, *, tied: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3, **options).double()
        self.head, self.tied = nn.Linear(3, 1).double(), tied

    def forward(self, words: Tensor) -> Tensor:
        out = torch.tanh(self.embedding(words).mean(1))
        logits = F.linear(out, self.embedding.weight).logsumexp(1, keepdim=True) if self.tied else 0
        return self.head(out) + logits


def padded_embedding() -> Setup:
    """`Embedding(padding_idx=...)`, tied to the output"""
    return Setup(Words(tied=True, padding_idx=0), data=tokens)


def bounded_embedding() -> Setup:
    """`Embedding(max_norm=...)`"""
    return Setup(Words(max_norm=0.5), data=tokens)


def sparse_gradients() -> Setup:
    """`Embedding(sparse=True)`"""
    return Setup(Words(sparse=True), Words(), data=tokens)


def compiled_module() -> Setup:
    """`torch.compile(net)`"""
    net = MLP()
    net.compile(backend="eager")
    return Setup(net, MLP())


def detached_upper() -> Setup:
    """A lower loss that detaches the upper variable"""
    return Setup(
        MLP(),
        loss=lambda batch, net, w: weighted(net(batch[0]), batch, w().detach()),
        plain=lambda call, batch, w, step: weighted(call(batch[0]), batch, w.detach()),
    )


def ignored_upper() -> Setup:
    """A lower loss that ignores the upper variable"""
    return Setup(
        MLP(),
        loss=lambda batch, net, w: (net(batch[0]) - batch[1]).square().mean(),
        plain=lambda call, batch, w, step: (call(batch[0]) - batch[1]).square().mean(),
    )


def distances() -> Setup:
    """`cdist`"""

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.first.weight)

    class Twin(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return (x[:, None] - self.first.weight).square().sum(-1).sqrt()

    return Setup(Net(), Twin())


def dropout_in_eval_mode() -> Setup:
    """Dropout in eval mode"""

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.dropout(self.hidden(x)))

    return Setup(Net(), MLP())


def tiny_losses() -> Setup:
    """A lower loss of the size 1e-150"""

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        return 1e-150 * weighted(net(batch[0]), batch, w())

    return Setup(MLP(), loss=loss, plain=lambda call, batch, w, step: 1e-150 * weighted(call(batch[0]), batch, w))


def read_past_the_arguments() -> Setup:
    """A loss that reads a parameter from outside of its arguments"""
    net = MLP()
    weight = net.first.weight

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        return weighted(net(batch[0]), batch, w()) + (weight**4).sum() * w().sum()

    return Setup(net, loss=loss)


class _Elementary(nn.Module):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / v.square().sum(1, keepdim=True).sqrt())

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.square().sum(1, keepdim=True).sqrt(), weight


def weight_normalization() -> Setup:
    """`weight_norm`, whose second derivative in torch is wrong"""
    net, twin = MLP(), MLP()
    parametrizations.weight_norm(net.first)
    parametrize.register_parametrization(twin.first, "weight", _Elementary())
    return Setup(net, twin)


def integer_buffer() -> Setup:
    """Integer and boolean buffers"""

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True, True]))
            self.register_buffer("order", torch.tensor([3, 1, 0, 2]))

        def hidden(self, x: Tensor) -> Tensor:
            return (super().hidden(x) * self.mask)[:, self.order]

    return Setup(Net())


KINDS: dict[str, Callable[[], Setup]] = {
    make.__name__: make
    for make in (
        plain,
        activation_checkpointing,
        reentrant_checkpointing,
        once_differentiable_function,
        function_without_jvp,
        numbers_of_torch,
        numbers_of_numpy,
        numbers_of_python,
        numbers_of_an_own_generator,
        parameter_hook,
        post_accumulate_hook,
        optimizer_pre_hook,
        optimizer_post_hook,
        projection,
        teacher,
        clock,
        step_argument,
        optimizer_attribute,
        complex_parameters,
        padded_embedding,
        bounded_embedding,
        sparse_gradients,
        compiled_module,
        detached_upper,
        ignored_upper,
        distances,
        dropout_in_eval_mode,
        tiny_losses,
        read_past_the_arguments,
        integer_buffer,
        weight_normalization,
    )
}
