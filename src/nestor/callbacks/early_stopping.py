"""The end of a run whose metric no longer improves."""

from __future__ import annotations

from typing import Any

from nestor.callbacks.best import Mode, check_mode, choose, is_better
from nestor.training.callback import Callback
from nestor.training.run import Run


class EarlyStopping(Callback):
    """End the run when a metric has not improved in ``patience`` evaluations in a row.

    The metric ``"level/name"`` of a level is evaluated every ``every`` engine steps, once the level has stepped. Any
    other name is a metric of the validation, evaluated after each validation. The run ends after the present engine
    step, without an error and with ``engine.step`` below the requested number. A further ``engine.run`` keeps the best
    value and counts evaluations from zero again. If the callback ended a run, that run ends at once when it is resumed.
    List ``Checkpoint`` after ``EarlyStopping``, so that the checkpoint contains the state of ``EarlyStopping``.

    Args:
        metric: A key of ``engine.validation``, such as ``"accuracy"``, or a metric of a level, such as ``"net/loss"``.
        mode: ``"min"`` if small values are good, ``"max"`` if large values are good.
        patience: Evaluations in a row without an improvement that end the run.
        min_delta: The smallest improvement that counts, in units of the metric.
        every: Engine steps between two evaluations of a level's metric. Reading it waits for the device.

    Attributes:
        best: The best value so far; None before the first evaluation.
        best_step: The engine step of the best value.
        stopped_at: The engine step at which the callback ended the last run; None if the callback did not end it.

    Raises:
        ValueError: If an option is out of range; in the run, if there is no such metric or no validation.
    """

    def __init__(
        self, metric: str, mode: Mode = "min", patience: int = 5, *, min_delta: float = 0.0, every: int = 1
    ) -> None:
        for name, value in (("patience", patience), ("every", every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"EarlyStopping({name}={value!r}) must be an integer of at least 1.")
        check_mode(mode, min_delta)
        self.metric = metric
        self.mode: Mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.every = every
        self.best: float | None = None
        self.best_step: int | None = None
        self.stopped_at: int | None = None
        self._without_improvement = 0

    def is_due(self, engine: Run, step: int) -> bool:
        return self._level(engine) is not None and step % self.every == 0

    def on_start(self, engine: Run) -> None:
        if self._level(engine) is None and not engine.validate_every:
            raise ValueError(
                f"EarlyStopping({self.metric!r}) needs validations, but with Engine(validate_every=0) there are none "
                "during a run. Give validate=... and validate_every=..., or choose a metric of a level: "
                f"{', '.join(repr(f'{name}/loss') for name in engine.states)}."
            )
        if self.stopped_at is not None and engine.is_resuming:
            engine.last_step = engine.step
        elif self.stopped_at is not None:
            self._without_improvement, self.stopped_at = 0, None

    def on_step(self, engine: Run) -> None:
        level = self._level(engine)
        if level is not None and engine.step % self.every == 0 and engine.states[level].metrics.gradient is not None:
            self._evaluate(engine, engine.read_all_metrics())

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        if self._level(engine) is None:
            self._evaluate(engine, metrics)

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self.best, "best_step": self.best_step}
        return {**best, "without_improvement": self._without_improvement, "stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self._without_improvement, self.stopped_at = state["without_improvement"], state["stopped_at"]

    def _level(self, engine: Run) -> str | None:
        """Return the level that the metric belongs to; None if it belongs to the validation."""
        level, slash, _ = self.metric.partition("/")
        return level if slash and level in engine.states else None

    def _evaluate(self, engine: Run, metrics: dict[str, float]) -> None:
        value = choose(metrics, self.metric, asked_by=f"EarlyStopping({self.metric!r})")
        if is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.best_step, self._without_improvement = value, engine.step, 0
            return
        self._without_improvement += 1
        if self._without_improvement >= self.patience and engine.step < engine.last_step:
            self.stopped_at = engine.last_step = engine.step
