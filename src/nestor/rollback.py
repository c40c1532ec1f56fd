"""Look-ahead: a level's state at the start of its unroll, to go back to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestor.level import Level


@dataclass(frozen=True)
class Snapshot:
    """Copies of everything that a step of a level changes."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None

    @classmethod
    def take(cls, level: Level) -> Snapshot:
        """Copy the state of a level."""
        problem = level.problem
        assert problem.optimizer is not None
        return cls(
            parameters=[p.detach().clone() for p in level.parameters],
            buffers=[b.clone() for b in problem.module.buffers()],
            optimizer=copy.deepcopy(problem.optimizer.state_dict()),
            scheduler=copy.deepcopy(problem.scheduler.state_dict()) if problem.scheduler else None,
        )

    def restore(self, level: Level) -> None:
        """Put the copies back, bit for bit."""
        problem = level.problem
        assert problem.optimizer is not None
        with torch.no_grad():
            for parameter, value in zip(level.parameters, self.parameters, strict=True):
                parameter.copy_(value)
            for buffer, value in zip(problem.module.buffers(), self.buffers, strict=True):
                buffer.copy_(value)
        problem.optimizer.load_state_dict(self.optimizer)
        if problem.scheduler is not None and self.scheduler is not None:
            problem.scheduler.load_state_dict(self.scheduler)
