"""The interface of a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from nestor.engine import Engine


class Callback:
    """Watches a run; subclass it and override what you need.

    Read numbers with ``engine.read_metrics()``: that waits for the device, so not at every step.
    """

    only_first: ClassVar[bool] = False
    """Whether the callback is called in the first process only, as what writes files is. Such a callback must not take
    part in anything that processes do together."""

    reads_moments: ClassVar[bool] = False
    """Whether the callback evaluates responses at moments of the run (``runner.moment()``): what they need is then kept
    beyond the step of the level above."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the callback."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""

    def looks_at(self, engine: Engine, step: int) -> bool:
        """Whether it has anything to do after an engine step.

        A compiled engine takes several engine steps at once while no callback looks in between, and calls all at their
        end. As it stands here, a callback with ``on_step`` or ``on_level_step`` looks at every step.
        """
        own = type(self)
        return own.on_step is not Callback.on_step or own.on_level_step is not Callback.on_level_step

    def on_start(self, engine: Engine) -> None:
        """Called before the first step of ``engine.run``."""

    def on_level_step(self, engine: Engine, level: str) -> None:
        """Called after an optimizer step of ``level``; its state is ``engine.runners[level]``."""

    def on_step(self, engine: Engine) -> None:
        """Called at the end of an engine step, number ``engine.step``."""

    def on_validation(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Called after a validation."""

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Called when ``engine.run`` ends, with the error that ended it if one did."""
