r"""VJPs of the steps of SGD, Adam, AdamW, RMSprop and Adagrad in closed form, on lists of variables.

A step maps variables :math:`\theta`, a gradient :math:`g` and memory :math:`s` to :math:`\theta'` and :math:`s'`. Its
VJP maps cotangents :math:`\bar\theta', \bar s'` to :math:`\bar\theta, \bar g, \bar s`, as a reverse pass through the
graph of the step would, without that graph. As in :mod:`nestor.optim.rules`, the derivative of the square root at zero
is zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.torch_private import (
    foreach_add,
    foreach_add_,
    foreach_addcmul,
    foreach_addcmul_,
    foreach_clamp_min_,
    foreach_div,
    foreach_div_,
    foreach_mul,
    foreach_mul_,
    foreach_sqrt,
)
from nestor.optim.rule_steps import Lists, Rows, bias_corrections, decayed_rate


@dataclass(frozen=True)
class Cotangents:
    """Cotangents on the result of a step.

    Attributes:
        params: On the variables.
        slots: On the memory, overwritten; a key that is missing has the cotangent zero.
    """

    params: list[Tensor]
    slots: Lists

    def plus(self, key: str, values: list[Tensor], factor: float = 1.0) -> list[Tensor]:
        """Add ``factor * values`` to the cotangent on an entry of the memory; ``values`` may be overwritten."""
        if key in self.slots:
            foreach_add_(self.slots[key], values, alpha=factor)
            return self.slots[key]
        if factor != 1.0:
            foreach_mul_(values, factor)
        return values


Pulled: TypeAlias = tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]
"""Cotangents on the variables before a step, on the gradient, and on the memory before the step."""

ListVJP: TypeAlias = Callable[[Rows, Lists, Cotangents], Pulled]
"""``(rows, after, cotangents)``: ``after`` is the memory after the step."""


def sgd(rows: Rows, after: Lists, cotangents: Cotangents) -> Pulled:
    r"""SGD: :math:`\bar u = -\eta \bar\theta'` on the direction, :math:`\bar b' + \bar u` on the momentum buffer."""
    group = rows.group
    outer = foreach_mul(cotangents.params, -group["lr"])
    momentum = group["momentum"]
    if momentum == 0:
        return *_descended(rows, cotangents.params, outer), {}
    nesterov = group["nesterov"]
    buffer = cotangents.plus("momentum_buffer", foreach_mul(outer, momentum) if nesterov else outer)
    if "momentum_buffer" not in rows.slots:  # the first buffer is the direction itself, without dampening
        return *_descended(rows, cotangents.params, foreach_add(outer, buffer) if nesterov else buffer), {}
    direction = foreach_mul(buffer, 1 - group["dampening"])
    if nesterov:
        foreach_add_(direction, outer)
    foreach_mul_(buffer, momentum)
    return *_descended(rows, cotangents.params, direction), {"momentum_buffer": buffer}


def adam(rows: Rows, after: Lists, cotangents: Cotangents) -> Pulled:
    r"""Adam and AdamW, with :math:`D = \sqrt{v'}/r + \epsilon` and the bias corrections in :math:`r` and :math:`\eta`.

    .. math:: \bar m = \bar m' - \eta\,\bar\theta'/D, \qquad
        \bar v = \bar v' + \eta\, \bar\theta' m' / (2 r \sqrt{v'} D^2), \qquad
        \bar g = (1 - \beta_1)\,\bar m + 2 (1 - \beta_2)\, g\,\bar v
    """
    group, gradient = rows.group, rows.descent()
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    root, size = bias_corrections(group, rows.count)
    deviation = _deviation(after["exp_avg_sq"])
    scale = foreach_div(deviation, root)
    foreach_add_(scale, group["eps"])
    quotient, square = _quotient(cotangents.params, after["exp_avg"], deviation, scale)
    first = cotangents.plus("exp_avg", quotient, -size)
    second = cotangents.plus("exp_avg_sq", square, size / (2 * root))
    found = foreach_mul(first, 1 - beta1)
    foreach_addcmul_(found, gradient, second, value=2 * (1 - beta2))
    before = {}
    if rows.slots:
        foreach_mul_(first, beta1)
        foreach_mul_(second, beta2)
        before = {"exp_avg": first, "exp_avg_sq": second}
    params = cotangents.params
    if decay != 0 and group.get("decoupled_weight_decay", False):
        params = foreach_mul(params, 1 - group["lr"] * decay)
    return *_descended(rows, params, found), before


def rmsprop(rows: Rows, after: Lists, cotangents: Cotangents) -> Pulled:
    r"""RMSprop: the quotient :math:`g/D` has the cotangent :math:`-\eta\bar\theta'`, or that of the momentum buffer."""
    group, gradient, before = rows.group, rows.descent(), {}
    alpha, mean = group["alpha"], after["grad_avg"] if group["centered"] else None
    variance = after["square_avg"]
    if mean is not None:
        variance = foreach_addcmul(variance, mean, mean, value=-1)
    deviation = _deviation(variance)
    scale = foreach_add(deviation, group["eps"])
    outer = foreach_mul(cotangents.params, -group["lr"])
    if group["momentum"] > 0:
        outer = before["momentum_buffer"] = cotangents.plus("momentum_buffer", outer)
    found, inner = _quotient(outer, gradient, deviation, scale)
    if group["momentum"] > 0:
        foreach_mul_(outer, group["momentum"])
    foreach_mul_(inner, -0.5)
    if mean is not None:
        # With a mean, the numerator need not be zero where the variance is.
        for derivative, value in zip(inner, variance, strict=True):
            derivative.masked_fill_(value == 0, 0.0)
        centre = cotangents.plus("grad_avg", foreach_mul(foreach_mul(inner, mean), -2.0))
        foreach_add_(found, centre, alpha=1 - alpha)
        foreach_mul_(centre, alpha)
        before["grad_avg"] = centre
    square = before["square_avg"] = cotangents.plus("square_avg", inner)
    foreach_addcmul_(found, gradient, square, value=2 * (1 - alpha))
    foreach_mul_(square, alpha)
    return *_descended(rows, cotangents.params, found), before if rows.slots else {}


def adagrad(rows: Rows, after: Lists, cotangents: Cotangents) -> Pulled:
    r"""Adagrad: the quotient :math:`g/D` has the cotangent :math:`-\eta_t\bar\theta'`."""
    group, gradient = rows.group, rows.descent()
    deviation = _deviation(after["sum"])
    scale = foreach_add(deviation, group["eps"])
    outer = foreach_mul(cotangents.params, -decayed_rate(group, rows.count))
    found, inner = _quotient(outer, gradient, deviation, scale)
    total = cotangents.plus("sum", inner, -0.5)
    foreach_addcmul_(found, gradient, total, value=2.0)
    return *_descended(rows, cotangents.params, found), {"sum": total} if rows.slots else {}


def _quotient(
    outer: list[Tensor], numerator: list[Tensor], deviation: list[Tensor], scale: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Return :math:`c/D` and :math:`c\,x / (D^2 s)` for cotangents ``c`` on :math:`x/D`, where ``s`` is a deviation.

    The scale :math:`D` is overwritten.
    """
    quotient = foreach_div(outer, scale)
    square = foreach_mul(quotient, numerator)
    foreach_mul_(scale, deviation)
    foreach_div_(square, scale)
    return quotient, square


def _deviation(square: list[Tensor]) -> list[Tensor]:
    """Return square roots, with the smallest positive root in place of zero.

    Where an average of squares is zero, so are the numerators, and the derivative is zero.
    """
    root: list[Tensor] = foreach_sqrt(square)
    info = torch.finfo(square[0].dtype)
    foreach_clamp_min_(root, (info.tiny * info.eps) ** 0.5)
    return root


def _descended(rows: Rows, params: list[Tensor], direction: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pull a cotangent on the gradient that the rule takes back to variables and gradient."""
    group = rows.group
    decay = 0.0 if group.get("decoupled_weight_decay", False) else group["weight_decay"]
    if decay != 0:
        params = foreach_add(params, direction, alpha=decay)
    return params, foreach_mul(direction, -1.0) if group["maximize"] else direction
