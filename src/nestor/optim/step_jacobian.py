"""Diagonal Jacobians -dStep/dg of SGD, Adam, AdamW, RMSprop and Adagrad, from the optimizer state after the step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from nestor.autodiff.scalar import read_or_keep
from nestor.optim.hyperparameters import tensors_in
from nestor.optim.rules import rule_of

StepJacobian: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]
r"""``(gradient, vector, slot, group) -> d * vector`` with :math:`d = -\partial\text{Step}/\partial g`, entry by entry.

``slot`` is the optimizer's state of the variable *after* the step with that gradient.
"""

# Number of entries of a piece: on a CPU, such pieces of a few vectors fit in the cache.
_PIECE = 2**16


def step_jacobian_of(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> StepJacobian | None:
    """Return the step Jacobian of an optimizer; None if its state after a step does not determine the Jacobian."""
    if rule_of(optimizer) is None or any(t.requires_grad for group in groups for _, t in tensors_in(group)):
        return None
    kind = type(optimizer)
    for group in groups:
        # SGD does not dampen its first step, and its state does not contain the number of the step. Weight decay that
        # is added to the gradient needs the variables before the step.
        coupled = group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False)
        if group["dampening"] != 0 if kind is SGD else coupled:
            return None
    return _JACOBIANS[kind]


def apply_step_jacobian(
    jacobian: StepJacobian, gradient: Tensor, vector: Tensor, slot: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor:
    """Multiply the step Jacobian onto a vector, in pieces on a CPU; the result is differentiable in ``vector``."""
    small = gradient.numel() <= 2 * _PIECE or gradient.device.type != "cpu"
    rows = {key: value for key, value in slot.items() if isinstance(value, Tensor) and value.shape == gradient.shape}
    if small or torch.is_grad_enabled() or not all(t.is_contiguous() for t in (gradient, vector, *rows.values())):
        return jacobian(gradient, vector, slot, group)
    product = torch.empty_like(gradient)
    pieces = [torch.split(t.view(-1), _PIECE) for t in (gradient, vector, product, *rows.values())]
    for g, v, out, *values in zip(*pieces, strict=True):
        out.copy_(jacobian(g, v, {**slot, **dict(zip(rows, values, strict=True))}, group))
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
        # Where an earlier maximum is larger, the maximum does not depend on this gradient.
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


_JACOBIANS: Mapping[type[Optimizer], StepJacobian] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}


def _quotient(
    x: Tensor, dx: float, change: Tensor, rate: Any, deviation: Tensor, scale: Tensor, vector: Tensor, size: Any
) -> Tensor:
    r"""Multiply :math:`\eta\, \partial(x / c) / \partial g` onto a vector, in few passes over memory.

    .. math:: \eta \Big(\frac{x'}{c} - \frac{x\, c'}{c^2}\Big) v, \qquad c' = \frac{r\, y}{s}

    Args:
        x: :math:`x`, the numerator.
        dx: :math:`x'`, its derivative.
        change: :math:`y`, a factor of the derivative of the variance.
        rate: :math:`r`, a factor of the derivative of the variance.
        deviation: :math:`s`, the square root of the variance; overwritten.
        scale: :math:`c`, the denominator.
        vector: :math:`v`.
        size: :math:`\eta`.
    """
    second = (x * change).mul_(size * -rate).div_(deviation.mul_(scale))
    return second.add_(size * dx).div_(scale) * vector


def _signed(group: Mapping[str, Any]) -> Any:
    return -group["lr"] if group["maximize"] else group["lr"]


def _root(square: Tensor) -> Tensor:
    """Return the square root with a positive lower bound: where it is zero, the numerators are zero too."""
    return square.sqrt().clamp_(min=torch.finfo(square.dtype).tiny ** 0.5)
