"""Ending a run that no longer gets better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nestor.callbacks.best import Best, Mode, choose
from nestor.callbacks.callback import Callback
from nestor.callbacks.measuring import measured

if TYPE_CHECKING:
    from nestor.engine import Engine


class EarlyStopping(Callback):
    """End the run when a metric has not improved ``patience`` times in a row.

    A metric ``"level/name"`` of a level is read every so many engine steps, once the level has stepped; any other name
    is one of the validation's, looked at after each validation. The run ends cleanly after the present engine step,
    with ``engine.step`` below what was asked for. A further ``engine.run`` keeps the best value and has new patience;
    resuming a run that was ended early ends at once. List ``Checkpoint`` after it, so that what it saw is saved.

    Args:
        metric: A key of ``engine.validation``, such as ``"accuracy"``, or a level's metric, such as ``"net/loss"``.
        mode: ``"min"`` if the metric is to fall, ``"max"`` if it is to rise.
        patience: Looks without an improvement that end the run.
        min_delta: What counts as an improvement, in units of the metric.
        every: Engine steps between two looks at a level's metric; reading it waits for the device.

    Attributes:
        best: The best value so far; None before the first look.
        best_step: The engine step that it was seen at.
        stopped_at: The engine step at which the last run was ended; None if it was not.

    Raises:
        ValueError: If an option is out of range; in the run if there is no such metric, or never a validation.
    """

    def __init__(
        self, metric: str, mode: Mode = "min", patience: int = 5, *, min_delta: float = 0.0, every: int = 1
    ) -> None:
        for name, value in (("patience", patience), ("every", every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"EarlyStopping({name}={value!r}) must be an integer of at least 1.")
        self.metric = metric
        self.patience = patience
        self.every = every
        self.best_step: int | None = None
        self.stopped_at: int | None = None
        self._best = Best(mode, min_delta)
        self._waited = 0

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self._best.value

    def on_start(self, engine: Engine) -> None:
        """Have new patience after a stop; refuse what would never be looked at."""
        if self._level(engine) is None and not engine.validate_every:
            raise ValueError(
                f"EarlyStopping({self.metric!r}) looks at validations, but with Engine(validate_every=0) there are "
                "none during a run. Give validate=... and validate_every=..., or watch a level's metric: "
                f"{', '.join(repr(f'{name}/loss') for name in engine.runners)}."
            )
        if self.stopped_at is None:
            return
        if engine.resuming:
            engine.target = engine.step
        else:
            self._waited = 0
            self.stopped_at = None

    def looks_at(self, engine: Engine, step: int) -> bool:
        """When it is due, if it watches a level."""
        return self._level(engine) is not None and step % self.every == 0

    def on_step(self, engine: Engine) -> None:
        """Look at a level's metric when it is time to."""
        level = self._level(engine)
        if level is not None and engine.step % self.every == 0 and engine.runners[level].gradient is not None:
            self._look(engine, measured(engine))

    def on_validation(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Look at the validation's metric."""
        if self._level(engine) is None:
            self._look(engine, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "waited": self._waited,
            "stopped_at": self.stopped_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what had been seen."""
        self._best.value = state["best"]
        self.best_step = state["best_step"]
        self._waited = state["waited"]
        self.stopped_at = state["stopped_at"]

    def _level(self, engine: Engine) -> str | None:
        """The level whose metric it is; None if it is the validation's."""
        level, slash, _ = self.metric.partition("/")
        return level if slash and level in engine.runners else None

    def _look(self, engine: Engine, metrics: dict[str, float]) -> None:
        value = choose(metrics, self.metric, asked_by=f"EarlyStopping({self.metric!r})")
        if self._best.improved_by(value):
            self.best_step = engine.step
            self._waited = 0
            return
        self._waited += 1
        if self._waited >= self.patience and engine.step < engine.target:
            self.stopped_at = engine.target = engine.step
