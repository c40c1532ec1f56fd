"""How fast a run is."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from nestor.callbacks.measuring import Measuring

if TYPE_CHECKING:
    from nestor.engine import Engine


class Throughput(Measuring):
    """Measure engine steps a second over the last steps: ``engine/steps_per_second``, ``engine/seconds_per_step``.

    Wall-clock time, with what validations and other callbacks take. Accelerators work behind the host: over a window
    that is longer than the queue the number is right all the same, and nothing is waited for.

    Args:
        window: Engine steps to look back on.

    Raises:
        ValueError: If ``window`` is not a positive integer.
    """

    def __init__(self, window: int = 50) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"Throughput(window={window!r}) must be an integer of at least 1.")
        self.window = window
        self._times: deque[tuple[int, float]] = deque(maxlen=window + 1)

    @property
    def steps_per_second(self) -> float:
        """Engine steps a second; NaN before the first step."""
        if len(self._times) < 2:
            return float("nan")
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (last - first) / max(end - begin, 1e-12)

    def on_start(self, engine: Engine) -> None:
        """Start the clock; time between two runs does not count."""
        self._times.clear()
        self._times.append((engine.step, time.perf_counter()))

    def looks_at(self, engine: Engine, step: int) -> bool:
        """At no step in particular: steps that are taken at once took their share of the time."""
        return False

    def on_step(self, engine: Engine) -> None:
        """Note the time."""
        self._times.append((engine.step, time.perf_counter()))

    def metrics(self) -> dict[str, float]:
        """Return the rate and its inverse; see :class:`Measuring`."""
        if len(self._times) < 2:
            return {}
        rate = self.steps_per_second
        return {"engine/steps_per_second": rate, "engine/seconds_per_step": 1 / rate}
