"""Look-ahead: snapshots of a level at the start of its unroll, which are restored after a step of a level above."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.levels.level import Level
from nestor.optim.hyperparameters import as_numbers, keep_tensors
from nestor.optim.stepper import attributes_of


@dataclass(frozen=True)
class Snapshot:
    """Copies of everything that a step of a level changes."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    constants: list[Tensor | None]
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    slots: list[Mapping[str, Any]]

    @classmethod
    def take(cls, level: Level, slots: list[Mapping[str, Any]]) -> Self:
        """Copy the state of a level; ``slots`` is the memory of its update rule."""
        problem = level.problem
        return cls(
            parameters=[p.detach().clone() for p in level.parameters],
            buffers=[b.clone() for b in problem.module.buffers()],
            constants=[] if level.loss.reader.constants is None else level.loss.reader.constants.values(),
            optimizer=copy.deepcopy(optimizer_dict(problem.optimizer)) if problem.optimizer else None,
            scheduler=copy.deepcopy(problem.scheduler.state_dict()) if problem.scheduler else None,
            slots=list(slots),
        )

    def restore(self, level: Level) -> list[Mapping[str, Any]]:
        """Restore the copied values, bitwise; return the slots."""
        problem = level.problem
        with torch.no_grad():
            for parameter, value in zip(level.parameters, self.parameters, strict=True):
                parameter.copy_(value)
            for buffer, value in zip(problem.module.buffers(), self.buffers, strict=True):
                buffer.copy_(value)
            if level.loss.reader.constants is not None:
                level.loss.reader.constants.restore(self.constants)
        if problem.optimizer is not None and self.optimizer is not None:
            load_optimizer(problem.optimizer, self.optimizer)
        if problem.scheduler is not None and self.scheduler is not None:
            problem.scheduler.load_state_dict(self.scheduler)
        return list(self.slots)


def optimizer_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer: its hyperparameters and those attributes of its class that are numbers too."""
    state = optimizer.state_dict()
    numbers = {k: v for k, v in attributes_of(optimizer).items() if isinstance(v, int | float | str | None)}
    return {**state, "param_groups": [as_numbers(group) for group in state["param_groups"]], "attributes": numbers}


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state into an optimizer; hyperparameters that are tensors stay the same tensors, with the new values.

    A learned learning rate is a variable of another level: ``load_state_dict`` alone would replace it by a copy.
    """
    held = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({key: value for key, value in state.items() if key != "attributes"})
    for name, value in state.get("attributes", {}).items():
        setattr(optimizer, name, value)
    for group, before in zip(optimizer.param_groups, held, strict=True):
        keep_tensors(group, before)
