"""How far the steps of the most common optimizers move with their gradients, from what these keep after a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from nestor.autodiff.scalar import read_or_keep
from nestor.optim.rules import rule_of

Slope: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]
r"""``(gradient, vector, slot, group) -> d * vector`` with :math:`d = -\partial\text{Step}/\partial g`, entry by entry.

``slot`` is what the optimizer keeps of the variable *after* the step that took the gradient.
"""

# On a CPU that many numbers of a few vectors stay in its cache.
_PIECE = 2**16


def slope_of(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> Slope | None:
    """Return the slope of an optimizer's rule; None where what it keeps after a step does not tell it."""
    if rule_of(optimizer, groups) is None:
        return None
    kind = type(optimizer)
    for group in groups:
        # The first step is not dampened, and none counts itself; a decay that is part of the gradient needs the
        # variables before the step.
        coupled = group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False)
        if group["dampening"] != 0 if kind is SGD else coupled:
            return None
    return _SLOPES[kind]


def sloped(slope: Slope, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Multiply the slope onto a vector, a piece at a time on a CPU; differentiable in ``vector``."""
    small = gradient.numel() <= 2 * _PIECE or gradient.device.type != "cpu"
    rows = {key: value for key, value in slot.items() if isinstance(value, Tensor) and value.shape == gradient.shape}
    if small or torch.is_grad_enabled() or not all(t.is_contiguous() for t in (gradient, vector, *rows.values())):
        return slope(gradient, vector, slot, group)
    product = torch.empty_like(gradient)
    pieces = [torch.split(t.view(-1), _PIECE) for t in (gradient, vector, product, *rows.values())]
    for g, v, out, *values in zip(*pieces, strict=True):
        out.copy_(slope(g, v, {**slot, **dict(zip(rows, values, strict=True))}, group))
    return product


def _sgd(gradient: Tensor, vector: Tensor, slot: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    r""":math:`\eta`, or :math:`\eta (1 + \mu)` with Nesterov's momentum."""
    factor = 1 + group["momentum"] if group["nesterov"] else 1.0
    product: Tensor = vector * (_signed(group) * factor)
    return product


def _adam(gradient: Tensor, vector: Tensor, slot: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    r""":math:`\eta\, \partial(\hat m / (\sqrt{\hat v} + \epsilon)) / \partial g`."""
    beta1, beta2 = group["betas"]
    count = read_or_keep(slot["step"])
    count = count.double() if isinstance(count, Tensor) else count
    root, size = (1 - beta2**count) ** 0.5, _signed(group) / (1 - beta1**count)
    if isinstance(root, Tensor):
        root, size = root.to(gradient.dtype), size.to(gradient.dtype)
    gradient = -gradient if group["maximize"] else gradient
    change = gradient
    square = slot["exp_avg_sq"]
    if group["amsgrad"]:
        # Where an earlier one is the largest, it does not change.
        change = gradient * (slot["max_exp_avg_sq"] == square)
        square = slot["max_exp_avg_sq"]
    deviation = _root(square)
    scale = (deviation / root).add_(group["eps"])
    return _quotient(slot["exp_avg"], 1 - beta1, change, (1 - beta2) / root, deviation, scale, vector, size)


def _rmsprop(gradient: Tensor, vector: Tensor, slot: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    r""":math:`\eta\, \partial(g / (\sqrt v + \epsilon)) / \partial g`."""
    gradient = -gradient if group["maximize"] else gradient
    variance, change = slot["square_avg"], gradient
    if group["centered"]:
        mean = slot["grad_avg"]
        variance, change = torch.addcmul(variance, mean, mean, value=-1), gradient - mean
    deviation = _root(variance)
    scale = deviation + group["eps"]
    return _quotient(gradient, 1.0, change, 1 - group["alpha"], deviation, scale, vector, _signed(group))


def _adagrad(gradient: Tensor, vector: Tensor, slot: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    r""":math:`\eta_t\, \partial(g / (\sqrt s + \epsilon)) / \partial g`."""
    gradient = -gradient if group["maximize"] else gradient
    size = _signed(group) / (1 + (read_or_keep(slot["step"]) - 1) * group["lr_decay"])
    deviation = _root(slot["sum"])
    return _quotient(gradient, 1.0, gradient, 1.0, deviation, deviation + group["eps"], vector, size)


_SLOPES: Mapping[type[Optimizer], Slope] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}


def _quotient(
    x: Tensor, dx: float, change: Tensor, rate: Any, deviation: Tensor, scale: Tensor, vector: Tensor, size: Any
) -> Tensor:
    r"""Multiply :math:`\eta\, \partial(x / c) / \partial g` onto a vector, in few passes.

    .. math:: \eta \Big(\frac{x'}{c} - \frac{x\, c'}{c^2}\Big) v, \qquad c' = \frac{r\, y}{s}

    Args:
        x: The numerator.
        dx: Its derivative.
        change: :math:`y`, in the derivative of the variance.
        rate: :math:`r`, likewise.
        deviation: :math:`s`, the square root of the variance; overwritten.
        scale: :math:`c`.
        vector: What is multiplied.
        size: :math:`\eta`.
    """
    second = (x * change).mul_(size * -rate).div_(deviation.mul_(scale))
    return second.add_(size * dx).div_(scale) * vector


def _signed(group: Mapping[str, Any]) -> Any:
    return -group["lr"] if group["maximize"] else group["lr"]


def _root(square: Tensor) -> Tensor:
    """Square root, kept off zero, where nothing that it divides is more than zero."""
    return square.sqrt().clamp_(min=torch.finfo(square.dtype).tiny ** 0.5)
