"""One step of an optimizer, in place."""

from __future__ import annotations

from typing import Any

from torch._C._autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim import optimizer as hooks


def step(optimizer: Optimizer) -> None:
    """Call ``optimizer.step()``, without its range for a profiler and its hooks where there are none.

    They take about 10 us a step, a good part of the step of a small model.
    """
    direct = getattr(type(optimizer).step, "__wrapped__", None)
    if (
        direct is None
        or not getattr(type(optimizer).step, "hooked", False)  # set by torch where it has wrapped the method
        or "step" in vars(optimizer)  # a scheduler counts the calls
        or _has_hooks(optimizer)
        or _profiler_enabled()
    ):
        optimizer.step()
    else:
        direct(optimizer)


def _has_hooks(optimizer: Optimizer) -> bool:
    own: Any = optimizer
    return bool(
        own._optimizer_step_pre_hooks
        or own._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
    )
