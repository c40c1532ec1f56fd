"""The learning rates of a run."""

from __future__ import annotations

from torch import Tensor

from nestor.training.callback import Callback
from nestor.training.run import Run


class LearningRate(Callback):
    """Measure the learning rates of every optimizer: ``level/lr``, and ``level/lr_1``, ... of further parameter groups.

    The values are the rates of the next step, since schedulers step after optimizers. Levels with ``update=...`` have
    no rate.
    """

    def __init__(self) -> None:
        self._run: Run | None = None

    def on_start(self, engine: Run) -> None:
        self._run = engine

    def metrics(self) -> dict[str, float]:
        """Return the present rates; empty before the first run."""
        states = self._run.states if self._run is not None else {}
        return {
            f"{name}/lr_{index}" if index else f"{name}/lr": _number(group["lr"])
            for name, state in states.items()
            if state.level.problem.optimizer is not None
            for index, group in enumerate(state.level.problem.optimizer.param_groups)
            if "lr" in group
        }


def _number(rate: float | Tensor) -> float:
    return rate.item() if isinstance(rate, Tensor) else float(rate)
