"""The speed of a run."""

from __future__ import annotations

import time
from collections import deque

from nestor.training.callback import Callback
from nestor.training.run import Run


class Throughput(Callback):
    """Measure ``engine/steps_per_second`` and ``engine/seconds_per_step`` over the last engine steps.

    Wall-clock time, validations and other callbacks included. The callback does not synchronize with an accelerator:
    the rate is right if the window is longer than the accelerator's queue.

    Args:
        window: Number of engine steps to average over.

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
        """Engine steps per second; NaN before the first step."""
        if len(self._times) < 2:
            return float("nan")
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (last - first) / max(end - begin, 1e-12)

    def is_due(self, engine: Run, step: int) -> bool:
        """Never: a time after several compiled steps gives the same rate."""
        return False

    def on_start(self, engine: Run) -> None:
        # The time between two runs does not count.
        self._times.clear()
        self._times.append((engine.step, time.perf_counter()))

    def on_step(self, engine: Run) -> None:
        self._times.append((engine.step, time.perf_counter()))

    def metrics(self) -> dict[str, float]:
        """Return the rate and its inverse; empty before the first step."""
        if len(self._times) < 2:
            return {}
        rate = self.steps_per_second
        return {"engine/steps_per_second": rate, "engine/seconds_per_step": 1 / rate}
