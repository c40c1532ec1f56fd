"""What all loggers share: when they write, and what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from nestor.callbacks.callback import Callback
from nestor.callbacks.measuring import measured

if TYPE_CHECKING:
    from nestor.engine import Engine


class Logger(Callback, ABC):
    """Writes the metrics of the levels and of :class:`Measuring` callbacks, and every validation.

    A subclass says how numbers are written, and opens and closes in ``on_start`` and ``on_end``. ``on_end`` is called
    even if ``on_start`` was not, since another callback's may have failed.

    Args:
        every: Engine steps between two readings; reading metrics waits for the device. Validations are always written.

    Raises:
        ValueError: If ``every`` is not a positive integer.
    """

    only_first: ClassVar[bool] = True

    def __init__(self, *, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"{type(self).__name__}(every={every!r}) must be an integer of at least 1.")
        self.every = every

    @abstractmethod
    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write numbers.

        Args:
            step: Engine steps taken; never less than in the call before.
            metrics: By name: ``level/name``, ``validation/name``, or a measuring callback's.
        """

    def looks_at(self, engine: Engine, step: int) -> bool:
        """When it is due."""
        return step % self.every == 0

    def on_step(self, engine: Engine) -> None:
        """Write the metrics when they are due."""
        if engine.step % self.every == 0:
            self.write(engine.step, measured(engine))

    def on_validation(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Write the validation."""
        self.write(engine.step, {f"validation/{name}": value for name, value in metrics.items()})
