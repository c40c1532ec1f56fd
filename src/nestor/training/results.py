"""Results of optimizer steps: which variables and which optimizer memory are not finite, and errors that name them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.errors import NonFiniteError
from nestor.levels.level import Gradient, Level
from nestor.optim.stepper import is_of_torch

Slots = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Watched:
    """What must be finite after every step of a level: what was finite before its first step in this run.

    Entries that are not finite from the start may be so on purpose (minus infinity as a mask).

    Attributes:
        level: The level.
        names: The names of the variables that were finite.
        buffers: The names of the buffers of its module that were finite.
        largest: The largest norm of a gradient for which no entry of the optimizer's memory can overflow.
    """

    level: Level
    names: frozenset[str]
    buffers: frozenset[str]
    largest: float

    @classmethod
    def of(cls, level: Level) -> "Watched":
        """Look at the variables and buffers of a level, before its first step. All processes must call this method."""
        flags = level.space.are_finite(level.parameters).tolist()
        names = frozenset(name for name, flag in zip(level.names, flags, strict=True) if flag)
        buffers = frozenset(name for name, buffer in floats(level.problem.module.named_buffers()) if is_whole(buffer))
        # Torch's optimizers square gradients and add up the squares, of 10^12 steps at most.
        largest = min(math.sqrt(torch.finfo(p.dtype).max) for p in level.parameters) * 1e-6
        optimizer = level.stepping.optimizer
        return cls(level, names, buffers, largest if optimizer is not None and is_of_torch(optimizer) else math.inf)

    def tensors(self, variables: Iterable[Tensor], slots: Slots) -> dict[str, Tensor]:
        """Return by name the variables to check, and the memory of an optimizer of torch.

        An optimizer of the user's, or an update rule, may keep infinity on purpose: it is not in the result.
        """
        named = dict(zip(self.level.names, variables, strict=True))
        found = {name: tensor for name, tensor in named.items() if name in self.names}
        if math.isfinite(self.largest):
            for name, slot in zip(named, slots, strict=True):
                if name in self.names:
                    # Counters stay on the CPU, where an accelerator would have to wait for them.
                    held = [(k, t) for k, t in floats(slot.items()) if t.device == named[name].device]
                    found |= {f"{key} of {name}": tensor for key, tensor in held}
        return found

    def broken_buffers(self) -> list[str]:
        """Name the buffers that have become not finite."""
        held = floats(self.level.problem.module.named_buffers())
        return [name for name, buffer in held if name in self.buffers and not is_whole(buffer)]


def floats(tensors: Iterable[tuple[str, Any]]) -> list[tuple[str, Tensor]]:
    """Select the tensors of numbers that can be infinite."""
    return [(n, t) for n, t in tensors if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def is_whole(tensor: Tensor) -> bool:
    """Return whether all entries are finite; waits for the device."""
    return bool(torch.isfinite(tensor).all())


def broken(level: Level, tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that are not finite on any process; for a level with tasks, with the tasks."""
    flags = level.space.are_finite(list(tensors.values())).tolist() if tensors else []
    names = [name for name, flag in zip(tensors, flags, strict=True) if not flag]
    return names if level.problem.tasks is None else [_with_tasks(name, tensors[name]) for name in names]


def _with_tasks(name: str, stacked: Tensor) -> str:
    if not stacked.dim():
        return name
    flags = torch.isfinite(stacked).reshape(len(stacked), -1).all(dim=1).tolist()
    return f"{name} (tasks {listed([str(task) for task, flag in enumerate(flags) if not flag])})"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Join names; of very many, only the first ones."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def result_error(
    level: Level, gradient: Gradient, names: Sequence[str], *, newest: Callable[[], Path | None] | None
) -> NonFiniteError:
    """Return the error of a step whose gradient is finite and whose result is not.

    Args:
        level: The level.
        gradient: The gradient of the step.
        names: What is not finite, if it is known.
        newest: Finds the newest checkpoint, if the variables are lost; None if they are as before the step.
    """
    what = f"The result of the step is not finite{': ' if names else ''}{listed(names)}."
    why = f"Loss and gradient are finite (norm {float(gradient.norm):.3g}), so it is the step of {_rule(level)}."
    remedy = "Look for eps=0, too large a learning rate, or gradients so large that their squares overflow."
    if newest is None:
        error = NonFiniteError(f"{what} {why} {remedy} Parameters and optimizer memory are as before the step.")
    else:
        error = NonFiniteError(f"{what} {why} {remedy} These values are lost. {recovery(newest())}")
        error.lost = tuple(names)
    return error.located(level=level.name, where=level.loss.where)


def recovery(checkpoint: Path | None) -> str:
    """Return how lost variables come back, and how not to lose them."""
    keep = "Engine(keep_last=True) keeps a copy before each step and restores it."
    if checkpoint is None:
        return f"There is no checkpoint to resume from. {keep}"
    return f'The newest checkpoint is {checkpoint}: engine.run(steps, resume="latest"). {keep}'


def _rule(level: Level) -> str:
    optimizer = level.stepping.optimizer
    if optimizer is None:
        return "the level's update rule"
    group = optimizer.param_groups[0]
    options = [f"{key}={float(group[key]):g}" for key in ("lr", "eps") if isinstance(group.get(key), float | Tensor)]
    return f"{type(optimizer).__name__}({', '.join(options)})"
