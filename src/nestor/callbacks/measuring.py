"""Callbacks that measure, and what loggers read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from nestor.callbacks.callback import Callback

if TYPE_CHECKING:
    from nestor.engine import Engine


class Measuring(Callback, ABC):
    """A callback with numbers of its own, which loggers of the same engine write beside the levels' metrics.

    A logger that stands before it in ``Engine(callbacks=...)`` sees the numbers of the step before.
    """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return the present numbers by name, such as ``"memory/resident_mb"``; empty if there are none yet."""


def measured(engine: Engine) -> dict[str, float]:
    """Read the metrics of every level and of every :class:`Measuring` callback; this waits for the device.

    Raises:
        NonFiniteError: If a step since the last look was not finite.
    """
    metrics = engine.read_metrics()
    for callback in engine.callbacks:
        if isinstance(callback, Measuring):
            metrics |= callback.metrics()
    return metrics
