"""Steps of SGD, Adam, AdamW, RMSprop and Adagrad on lists of variables, without a graph.

Each operation takes all variables at once, which is several times as fast for small ones. The operations and their
order are those of ``torch.optim``, so that a step has the bits of the optimizer's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.torch_private import (
    foreach_add,
    foreach_add_,
    foreach_addcdiv,
    foreach_addcmul,
    foreach_addcmul_,
    foreach_div_,
    foreach_lerp,
    foreach_mul,
    foreach_sqrt,
)

Lists: TypeAlias = Mapping[str, list[Tensor]]
"""The optimizer's memory of some variables: one list for each key, with one tensor for each variable."""


@dataclass(frozen=True)
class Rows:
    """Variables of one parameter group that have taken equally many steps: one formula of numbers holds for all.

    Attributes:
        group: Their hyperparameters, numbers.
        count: Number of steps, with this one; 1 for a rule that does not count.
        params: The variables before the step.
        grads: The gradients.
        slots: The memory before the step; empty before the first step.
    """

    group: Mapping[str, Any]
    count: float
    params: list[Tensor]
    grads: list[Tensor]
    slots: Lists

    def descent(self) -> list[Tensor]:
        """Return the gradient that the rule takes: its sign with ``maximize``, and weight decay that is added to it."""
        grads = foreach_mul(self.grads, -1.0) if self.group["maximize"] else self.grads
        decay = 0.0 if self.group.get("decoupled_weight_decay", False) else self.group["weight_decay"]
        return foreach_add(grads, self.params, alpha=decay) if decay != 0 else grads

    def read(self, key: str) -> list[Tensor]:
        """Return the tensors of the memory; zeros before the first step."""
        return self.slots[key] if key in self.slots else [torch.zeros_like(p) for p in self.params]


ListStep: TypeAlias = Callable[[Rows], tuple[list[Tensor], dict[str, list[Tensor]]]]
"""Maps variables before a step to the variables and the memory after it."""


def sgd(rows: Rows) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """SGD; see :mod:`nestor.optim.rules` for the formulas."""
    group, direction, new = rows.group, rows.descent(), {}
    momentum = group["momentum"]
    if momentum != 0:
        buffer = direction
        if "momentum_buffer" in rows.slots:
            buffer = foreach_mul(rows.slots["momentum_buffer"], momentum)
            foreach_add_(buffer, direction, alpha=1 - group["dampening"])
        new["momentum_buffer"] = buffer
        direction = foreach_add(direction, buffer, alpha=momentum) if group["nesterov"] else buffer
    return foreach_add(rows.params, direction, alpha=-group["lr"]), new


def adam(rows: Rows) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Adam and AdamW, without ``amsgrad``."""
    group, direction = rows.group, rows.descent()
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    is_decoupled = decay != 0 and group.get("decoupled_weight_decay", False)
    params = foreach_mul(rows.params, 1 - lr * decay) if is_decoupled else rows.params
    first = foreach_lerp(rows.read("exp_avg"), direction, 1 - beta1)
    second = foreach_mul(rows.read("exp_avg_sq"), beta2)
    foreach_addcmul_(second, direction, direction, value=1 - beta2)
    root, size = bias_corrections(group, rows.count)
    scale = foreach_sqrt(second)
    foreach_div_(scale, root)
    foreach_add_(scale, group["eps"])
    return foreach_addcdiv(params, first, scale, value=-size), {"exp_avg": first, "exp_avg_sq": second}


def rmsprop(rows: Rows) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """RMSprop."""
    group, direction = rows.group, rows.descent()
    square = foreach_mul(rows.read("square_avg"), group["alpha"])
    foreach_addcmul_(square, direction, direction, value=1 - group["alpha"])
    new, variance = {"square_avg": square}, square
    if group["centered"]:
        new["grad_avg"] = foreach_lerp(rows.read("grad_avg"), direction, 1 - group["alpha"])
        variance = foreach_addcmul(square, new["grad_avg"], new["grad_avg"], value=-1)
    scale = foreach_sqrt(variance)
    foreach_add_(scale, group["eps"])
    if group["momentum"] > 0:
        buffer = foreach_mul(rows.read("momentum_buffer"), group["momentum"])
        new["momentum_buffer"] = foreach_addcdiv(buffer, direction, scale)
        return foreach_add(rows.params, new["momentum_buffer"], alpha=-group["lr"]), new
    return foreach_addcdiv(rows.params, direction, scale, value=-group["lr"]), new


def adagrad(rows: Rows) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Adagrad."""
    group, direction = rows.group, rows.descent()
    start = group["initial_accumulator_value"]
    before = rows.slots["sum"] if "sum" in rows.slots else [torch.full_like(p, start) for p in rows.params]
    total = foreach_addcmul(before, direction, direction)
    scale = foreach_sqrt(total)
    foreach_add_(scale, group["eps"])
    return foreach_addcdiv(rows.params, direction, scale, value=-decayed_rate(group, rows.count)), {"sum": total}


def bias_corrections(group: Mapping[str, Any], count: float) -> tuple[float, float]:
    """Return the square root of Adam's second bias correction, and the learning rate divided by the first one."""
    beta1, beta2 = group["betas"]
    return (1 - beta2**count) ** 0.5, group["lr"] / (1 - beta1**count)


def decayed_rate(group: Mapping[str, Any], count: float) -> float:
    """Return Adagrad's learning rate at a step."""
    rate: float = group["lr"] / (1 + (count - 1) * group["lr_decay"])
    return rate
