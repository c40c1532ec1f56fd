"""The update rules of SGD, Adam, AdamW, RMSprop and Adagrad in closed form.

:func:`functional_step` can differentiate any optimizer of torch. For these five, the closed form is several times as
fast, and it can be traced.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from nestor.autodiff.scalar import read_or_keep
from nestor.vectors import VectorSpace

Slot: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Tensor, Tensor, Slot, Mapping[str, Any]], "tuple[Tensor, dict[str, Any]]"]


def rule_of(optimizer: Optimizer) -> Rule | None:
    """Return the closed form of an optimizer's rule; None if there is none."""
    return _RULES.get(type(optimizer))


def apply_rule(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    slots: Sequence[Slot],
    groups: Iterable[Mapping[str, Any]],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Take one step of every parameter; ``groups`` are the hyperparameters of each. Return parameters and slots."""
    after = [
        (theta, dict(slot))
        if gradient is None
        else _in_real_parts(rule, theta, gradient, slot, group)
        if theta.is_complex()
        else rule(theta, gradient, slot, group)
        for theta, gradient, slot, group in zip(params, grads, slots, groups, strict=True)
    ]
    return [theta for theta, _ in after], [slot for _, slot in after]


def _in_real_parts(
    rule: Rule, theta: Tensor, gradient: Tensor, slot: Slot, group: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Step the real and the imaginary parts of a complex variable, as torch does."""
    real = {key: torch.view_as_real(v) if isinstance(v, Tensor) and v.is_complex() else v for key, v in slot.items()}
    after, new = rule(torch.view_as_real(theta), torch.view_as_real(gradient.resolve_conj()), real, group)
    back = {key: torch.view_as_complex(v) if isinstance(v, Tensor) and v.dim() else v for key, v in new.items()}
    return torch.view_as_complex(after), back


def _sgd(theta: Tensor, gradient: Tensor, slot: Slot, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    r"""SGD: :math:`b = \mu b + (1 - \tau) g`, :math:`\theta - \eta\, b`, or :math:`\theta - \eta (g + \mu b)`."""
    gradient = _decayed(theta, gradient, group)
    momentum = group["momentum"]
    new = dict(slot)
    if momentum != 0:
        before = slot.get("momentum_buffer")
        buffer = gradient
        if before is not None:
            buffer = _plus(before * momentum, 1 - group["dampening"], gradient)
        new["momentum_buffer"] = buffer
        gradient = _plus(gradient, momentum, buffer) if group["nesterov"] else buffer
    return _moved(theta, gradient, group["lr"]), new


def _adam(theta: Tensor, gradient: Tensor, slot: Slot, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    r"""Adam: :math:`\theta - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)`, with or without decoupled weight decay."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    if group.get("decoupled_weight_decay", False):
        gradient = -gradient if group["maximize"] else gradient
        theta = theta * (1 - lr * decay) if _is_on(decay) else theta
    else:
        gradient = _decayed(theta, gradient, group)
    step = next_count(theta, slot, group)
    first = slot["exp_avg"] if slot else torch.zeros_like(theta)
    second = slot["exp_avg_sq"] if slot else torch.zeros_like(theta)
    first = _mixed(first, 1 - beta1, gradient)
    second = _plus_product(second * beta2, 1 - beta2, gradient)
    new = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    largest = second
    if group["amsgrad"]:
        largest = torch.maximum(slot["max_exp_avg_sq"], second) if slot else second
        new["max_exp_avg_sq"] = largest
    count = read_or_keep(step)
    count = count.double() if isinstance(count, Tensor) else count
    root = (1 - beta2**count) ** 0.5
    size = lr / (1 - beta1**count)
    return _stepped(theta, first, _root(largest) / _like(theta, root) + group["eps"], _like(theta, size)), new


def _rmsprop(theta: Tensor, gradient: Tensor, slot: Slot, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    r"""RMSprop: :math:`v = \alpha v + (1 - \alpha) g^2`, :math:`\theta - \eta\, g / (\sqrt v + \epsilon)`."""
    gradient = _decayed(theta, gradient, group)
    alpha = group["alpha"]
    square = slot["square_avg"] if slot else torch.zeros_like(theta)
    square = _plus_product(square * alpha, 1 - alpha, gradient)
    new = {"step": next_count(theta, slot, group), "square_avg": square}
    variance = square
    if group["centered"]:
        mean = _mixed(slot["grad_avg"] if slot else torch.zeros_like(theta), 1 - alpha, gradient)
        new["grad_avg"] = mean
        variance = torch.addcmul(square, mean, mean, value=-1)
    scale = _root(variance) + group["eps"]
    if group["momentum"] > 0:
        buffer = slot["momentum_buffer"] if slot else torch.zeros_like(theta)
        new["momentum_buffer"] = torch.addcdiv(buffer * group["momentum"], gradient, scale)
        return _moved(theta, new["momentum_buffer"], group["lr"]), new
    return _stepped(theta, gradient, scale, group["lr"]), new


def _adagrad(theta: Tensor, gradient: Tensor, slot: Slot, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    r"""Adagrad: :math:`s = s + g^2`, :math:`\theta - \eta_t\, g / (\sqrt s + \epsilon)`."""
    gradient = _decayed(theta, gradient, group)
    total = slot["sum"] if slot else torch.zeros_like(theta) + group["initial_accumulator_value"]
    total = torch.addcmul(total, gradient, gradient)
    step = next_count(theta, slot, group)
    size = group["lr"] / (1 + (read_or_keep(step) - 1) * group["lr_decay"])
    return _stepped(theta, gradient, _root(total) + group["eps"], _like(theta, size)), {"step": step, "sum": total}


_RULES: Mapping[type[Optimizer], Rule] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}


def _decayed(theta: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    gradient = -gradient if group["maximize"] else gradient
    decay = group["weight_decay"]
    return _plus(gradient, decay, theta) if _is_on(decay) else gradient


def _is_on(number: float | Tensor) -> bool:
    """Return whether a term with this factor is part of the rule; a tensor may be learned, even if it is zero."""
    return isinstance(number, Tensor) or number != 0


def _like(theta: Tensor, number: float | Tensor) -> float | Tensor:
    return number.to(theta.dtype) if isinstance(number, Tensor) else number


# The fused operations take Python numbers only: for a factor that is a tensor, the same sum is written out.


def _plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _plus_product(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    return x + factor * (y * y) if isinstance(factor, Tensor) else torch.addcmul(x, y, y, value=factor)


def _mixed(x: Tensor, weight: float | Tensor, y: Tensor) -> Tensor:
    return x + weight * (y - x) if isinstance(weight, Tensor) else torch.lerp(x, y, weight)


def _moved(theta: Tensor, direction: Tensor, lr: float | Tensor) -> Tensor:
    return theta - lr * direction if isinstance(lr, Tensor) else torch.add(theta, direction, alpha=-lr)


def _stepped(theta: Tensor, direction: Tensor, scale: Tensor, size: float | Tensor) -> Tensor:
    if isinstance(size, Tensor):
        return theta - size * direction / scale
    return torch.addcdiv(theta, direction, scale, value=-size)


def _root(square: Tensor) -> Tensor:
    """Return the square root, with derivative zero at zero."""
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def next_count(theta: Tensor, slot: Slot, group: Mapping[str, Any]) -> Tensor:
    """Return the step counter, with the dtype and on the device that torch uses."""
    if slot:
        count: Tensor = slot["step"] + 1
        return count
    on_device = group.get("capturable") or group.get("fused")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.ones((), dtype=dtype, device=theta.device if on_device else torch.device("cpu"))


def optimizer_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copy the optimizer's current hyperparameters, which a scheduler may change later."""
    return [
        {key: value for key, value in group.items() if key != "params"}  # a tensor-valued one stays the same tensor
        for group in optimizer.param_groups
    ]


def copy_slot(slot: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the optimizer's state of one parameter."""
    return {key: _copy(value) for key, value in slot.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def clip(
    space: VectorSpace, grads: Sequence[Tensor | None], max_norm: float | None, norm: Tensor | None = None
) -> list[Tensor | None]:
    """Scale a gradient with a norm above ``max_norm`` to ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does."""
    present = [g for g in grads if g is not None]
    if max_norm is None or not present:
        return list(grads)
    norm = space.differentiable_norm(present) if norm is None else norm
    # 1e-6 is torch's constant, so that both functions give the same result.
    factor = space.replicate(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return [None if g is None else g * factor for g in grads]


def clip_tasks(grads: Sequence[Tensor | None], max_norm: float | None) -> list[Tensor | None]:
    """Clip the gradient of each task separately; the leading dimension of every tensor counts the tasks."""
    present = [g for g in grads if g is not None]
    if max_norm is None or not present:
        return list(grads)
    square = torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in present]).sum(0)
    # The derivative of sqrt is infinite at zero: for a task with zero gradient, use sqrt(1) * 0.
    norm = torch.where(square == 0, 1.0, square).sqrt() * (square != 0)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return [None if g is None else g * factor.view(-1, *[1] * (g.dim() - 1)) for g in grads]
