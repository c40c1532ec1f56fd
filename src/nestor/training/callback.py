"""The interface of a callback."""

from pathlib import Path
from typing import Any, ClassVar

from nestor.training.run import Run


class Callback:
    """Observes a run. Subclass it and override the methods that you need.

    ``engine.read_metrics()`` returns the metrics. It waits for the device, so do not call it at every step.

    Example:
        >>> class Print(nestor.callbacks.Callback):
        ...     def on_step(self, engine):
        ...         print(engine.step, engine.read_metrics()["net/loss"])
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> metrics = nestor.Engine(program, callbacks=[Print()], seed=0).run(2)
        1 2.0
        2 0.5
    """

    only_first: ClassVar[bool] = False
    """True if only the first process calls the callback, because it writes files or to a terminal. Such a callback must
    not take part in collective operations."""

    def is_due(self, engine: Run, step: int) -> bool:
        """Return True if the callback must run after engine step ``step``.

        A compiled engine takes several engine steps at once if no callback is due in between, and calls all callbacks
        after the last one. A callback that overrides ``on_level_step`` and is due is called after each level. By
        default, a callback that overrides ``on_step`` or ``on_level_step`` is due at every step.
        """
        own = type(self)
        return own.on_step is not Callback.on_step or own.on_level_step is not Callback.on_level_step

    def on_start(self, engine: Run) -> None:
        """Called before the first step of ``engine.run``."""

    def on_level_step(self, engine: Run, level: str) -> None:
        """Called after an optimizer step of ``level``, whose state is ``engine.states[level]``."""

    def on_step(self, engine: Run) -> None:
        """Called at the end of engine step ``engine.step``."""

    def before_validation(self, engine: Run) -> None:
        """Called before a validation; :meth:`on_end` is called if the validation raises an exception."""

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        """Called after a validation."""

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        """Called when ``engine.run`` ends; ``error`` is the exception that ended it, or None.

        It is called even if ``on_start`` was not, because ``on_start`` of an earlier callback may have failed, and even
        if ``on_end`` of an earlier callback has raised. The run then raises the first error of all.
        """

    def metrics(self) -> dict[str, float]:
        """Return measurements by name, such as ``"memory/resident_mb"``.

        Loggers write them beside the metrics of the levels. List the callback before the loggers: a logger listed
        earlier writes the measurements of the step before.
        """
        return {}

    def latest(self) -> Path | None:
        """Return the folder of the newest checkpoint that the callback has written, or None if there is none.

        ``engine.run(steps, resume="latest")`` calls the method of the first callback that overrides it.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that ``state_dict`` returned."""
