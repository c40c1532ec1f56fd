"""The base class of loggers."""

from abc import ABC, abstractmethod
from typing import ClassVar

from nestor.errors.options import check_options, typed
from nestor.training.callback import Callback
from nestor.training.run import Run


class Logger(Callback, ABC):
    """Writes the metrics of the levels, the measurements of the other callbacks, and every validation.

    A subclass implements ``write``, opens its file or service in ``on_start`` and closes it in ``on_end``. ``on_end``
    is called even if ``on_start`` was not, because ``on_start`` of an earlier callback may have failed.

    Args:
        every: Engine steps between two records; reading the metrics waits for the device. Every validation is written.

    Raises:
        ValueError: If ``every`` is not a positive integer.

    Example:
        >>> class Print(nestor.callbacks.Logger):
        ...     def write(self, step, metrics):
        ...         print(step, metrics["net/loss"])
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> metrics = nestor.Engine(program, callbacks=[Print(every=2)], seed=0).run(4)
        2 0.5
        4 0.03125
    """

    only_first: ClassVar[bool] = True

    @typed
    def __init__(self, *, every: int = 1) -> None:
        self.every = every
        check_options(self, counts=["every"])

    @abstractmethod
    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record.

        Args:
            step: Engine steps taken; never less than in the previous call.
            metrics: By name: ``level/name``, ``validation/name``, or a name that a callback has chosen.
        """

    def is_due(self, engine: Run, step: int) -> bool:
        return step % self.every == 0

    def on_step(self, engine: Run) -> None:
        if engine.step % self.every == 0:
            self.write(engine.step, engine.read_all_metrics())

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        self.write(engine.step, {f"validation/{name}": value for name, value in metrics.items()})
