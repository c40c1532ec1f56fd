"""The step of an optimizer as a function without a derivative: it is taken by a copy of the optimizer, on copies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.optim.rules import copy_slot
from nestor.optim.stepper import Groups, Slots, is_of_torch, slots_after, stepper_of, take
from nestor.vectors import Params


def step_of_copy(
    optimizer: Optimizer, params: Params, grads: Sequence[Tensor | None], slots: Slots, groups: Groups
) -> tuple[list[Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    """Take the optimizer's step without a derivative, bitwise, on copies; no argument changes.

    Returns:
        The parameters and their memory after the step, and the hyperparameters before it: numbers that earlier steps
        have moved are those of the memory.
    """
    with torch.no_grad():
        new = [p.detach().clone() for p in params]
        for parameter, gradient in zip(new, grads, strict=True):
            if gradient is not None:
                # A step of one's own may change its gradients in place (a weight decay).
                parameter.grad = gradient.detach() if is_of_torch(optimizer) else gradient.detach().clone()
        memory = [copy_slot({k: v.detach() if isinstance(v, Tensor) else v for k, v in slot.items()}) for slot in slots]
        stepper = stepper_of(optimizer, new, memory, groups)
        before = [{key: value for key, value in group.items() if key != "params"} for group in stepper.param_groups]
        take(stepper, optimizer)
        for parameter in new:
            parameter.grad = None
        return new, slots_after(stepper, optimizer, new, groups), before
