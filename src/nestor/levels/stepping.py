"""How a level steps: its update rule, and where its steps start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestor.errors import LossError
from nestor.optim.functional_step import copy_slot
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, Update
from nestor.responses.unrolling.step import StepCompiler
from nestor.vectors.algebra import Params
from nestor.vectors.space import LOCAL, VectorSpace


@dataclass(frozen=True, eq=False)
class Stepping:
    """The update rule of one level.

    Attributes:
        level: Name of the level.
        where: Its loss, as ``name (file:line)``, for errors.
        optimizer: Its optimizer, if it has one.
        parameters: The parameters that the optimizer holds. They differ from the level's variables for a level with
            tasks, whose variables are stacked copies.
        update: The user's update rule, if it has one.
        clip_norm: Largest norm of the gradient; None does not clip.
        learned: Hyperparameters that are variables of levels above: ``(group, name) -> (level, place)``.
        tasks: Whether the variables are stacked copies, one a task.
        restarts: Whether the steps start with an empty optimizer memory, again and again.
        space: The space of the level's vectors.
        compiler: Takes steps of histories by compiled graphs.
    """

    level: str
    where: str
    optimizer: Optimizer | None
    parameters: tuple[nn.Parameter, ...]
    update: Update | None
    clip_norm: float | None
    learned: Mapping[tuple[int, str], tuple[str, int]]
    tasks: bool
    restarts: bool
    space: VectorSpace = LOCAL
    compiler: StepCompiler | None = None

    def rule(self) -> Update:
        """Return the rule of the level's next step, with the present hyperparameters.

        Raises:
            LossError: If the level has no optimizer and no update.
        """
        if self.update is not None:
            return self.update
        if self.optimizer is None:
            raise LossError(
                "The level's response needs to know how the level steps: give it an optimizer, "
                "Problem(..., optimizer=...).",
                level=self.level,
                where=self.where,
            )
        return self._rule.now(self.optimizer)

    @cached_property
    def _rule(self) -> OptimizerUpdate:
        assert self.optimizer is not None
        return OptimizerUpdate.of(
            self.optimizer, self.parameters, self.clip_norm, self.learned, tasks=self.tasks, space=self.space
        )

    @property
    def optimizer_has_memory(self) -> bool:
        """Whether the optimizer holds the memory of the level's steps: not for a user's rule, nor for tasks."""
        return self.optimizer is not None and not self.tasks

    def optimizer_slots(self, parameters: Params) -> list[Mapping[str, Any]]:
        """Return what the optimizer holds, one mapping a variable."""
        assert self.optimizer is not None
        return [self.optimizer.state.get(p, {}) for p in parameters]

    def first_state(self, parameters: Params) -> State:
        """Copy the state from which planned steps start."""
        if self.optimizer_has_memory and not self.restarts:
            slots: list[Mapping[str, Any]] = [copy_slot(slot) for slot in self.optimizer_slots(parameters)]
        else:
            slots = self.rule().first_slots(len(parameters))
        return State([p.detach().clone() for p in parameters], slots)
