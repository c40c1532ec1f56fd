"""The learning rates of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nestor.callbacks.measuring import Measuring

if TYPE_CHECKING:
    from nestor.engine import Engine


class LearningRate(Measuring):
    """Read the learning rates of every level's optimizer: ``level/lr``, of further groups ``level/lr_1`` and so on.

    They are those of the next step, since schedules step after optimizers. Levels with ``update=...`` have none.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def on_start(self, engine: Engine) -> None:
        """Note whose rates to read."""
        self._engine = engine

    def metrics(self) -> dict[str, float]:
        """Return the present rates; see :class:`Measuring`."""
        levels = self._engine.program.levels if self._engine is not None else {}
        return {
            f"{name}/lr_{place}" if place else f"{name}/lr": _number(group["lr"])
            for name, level in levels.items()
            if level.problem.optimizer is not None
            for place, group in enumerate(level.problem.optimizer.param_groups)
            if "lr" in group
        }


def _number(rate: float | Tensor) -> float:
    return rate.item() if isinstance(rate, Tensor) else float(rate)
