"""What the update rule of a level keeps from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestor.levels.level import Level
from nestor.optim.functional_step import copy_slot
from nestor.optim.state import State
from nestor.training.history_state import pack_slots
from nestor.training.snapshot import load_optimizer


class OptimizerMemory:
    """Momentum, second moments and counters of one level.

    They lie in the level's optimizer. Those of a user's rule, and of an optimizer that steps stacked tasks, lie here.

    Args:
        level: The level.
        held: A memory that lies here whatever the level's rule is: placeholders of a trace.

    Attributes:
        slots: What lies here, one mapping a variable (as many as the rule likes, for a user's rule).
    """

    def __init__(self, level: Level, held: list[dict[str, Any]] | None = None) -> None:
        self.slots: list[Mapping[str, Any]] = list(held or ())
        self._level = level
        self._in_optimizer = held is None and level.stepping.optimizer_has_memory

    def read(self) -> Sequence[Mapping[str, Any]]:
        """Return the memory itself, one mapping a variable."""
        stepping, parameters = self._level.stepping, self._level.parameters
        if self._in_optimizer:
            return stepping.optimizer_slots(parameters)
        return self.slots or stepping.rule().first_slots(len(parameters))

    def copies(self) -> list[dict[str, Any]]:
        """Copy the memory."""
        return [copy_slot(slot) for slot in self.read()]

    def state(self) -> State:
        """Copy the present variables and the memory."""
        return State(self._level.copies(), self.copies() if self._in_optimizer else self.read())

    def write(self, slots: Sequence[Mapping[str, Any]]) -> None:
        """Replace the memory."""
        optimizer = self._level.stepping.optimizer
        if optimizer is None or not self._in_optimizer:
            self.slots = list(slots)
            return
        for parameter, slot in zip(self._level.parameters, slots, strict=True):
            if slot:
                optimizer.state[parameter].update(slot)

    def clear(self) -> None:
        """Forget everything."""
        self.slots = []
        if (optimizer := self._level.stepping.optimizer) is not None:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data with whole vectors."""
        problem = self._level.problem
        return {
            "optimizer": None if problem.optimizer is None else self._gathered(problem.optimizer.state_dict()),
            "scheduler": problem.scheduler.state_dict() if problem.scheduler is not None else None,
            "slots": [dict(slot) for slot in self.slots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the memory of another run."""
        problem = self._level.problem
        if problem.optimizer is not None:
            load_optimizer(problem.optimizer, self._gathered(state["optimizer"], back=True))
        if problem.scheduler is not None:
            problem.scheduler.load_state_dict(state["scheduler"])
        self.slots = list(state["slots"])

    def _gathered(self, state: dict[str, Any], *, back: bool = False) -> dict[str, Any]:
        """Gather the vectors of an optimizer's state; ``back`` takes this process's shards of whole ones."""
        level, optimizer = self._level, self._level.problem.optimizer
        if level.loss.placements is None or optimizer is None:
            return state
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        places = [held.index(id(p)) for p in level.parameters]
        slots = [state["state"].get(place, {}) for place in places]
        like = level.gather(level.parameters) if back else level.parameters
        through = level.shard if back else level.gather
        packed = pack_slots(slots, [t for t in like if t is not None], through)
        changed = {place: slot for place, slot in zip(places, packed, strict=True) if slot}
        return {**state, "state": {**state["state"], **changed}}
