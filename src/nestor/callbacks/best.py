"""The best value of a metric so far."""

from __future__ import annotations

import math
from typing import Literal

Mode = Literal["min", "max"]


class Best:
    """Remembers the best of the values it is shown.

    Args:
        mode: ``"min"`` if small values are good, ``"max"`` if large ones are.
        min_delta: What a value must be better by than the best so far to count.

    Attributes:
        value: The best so far; None before the first number. NaN is never better.

    Raises:
        ValueError: If ``mode`` is unknown or ``min_delta`` negative.
    """

    def __init__(self, mode: Mode, min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' (a loss) or 'max' (an accuracy).")
        if not (min_delta >= 0 and math.isfinite(min_delta)):
            raise ValueError(f"min_delta={min_delta!r} must be a finite number >= 0, in units of the metric.")
        self.mode = mode
        self.min_delta = min_delta
        self.value: float | None = None

    def improved_by(self, value: float) -> bool:
        """Show a value; return whether it is the best so far, which it then becomes."""
        if math.isnan(value):
            return False
        if self.value is not None:
            gain = self.value - value if self.mode == "min" else value - self.value
            # Equal infinities differ by NaN: no gain.
            if not (gain > self.min_delta):
                return False
        self.value = value
        return True


def choose(metrics: dict[str, float], name: str, *, asked_by: str) -> float:
    """Take a metric.

    Args:
        metrics: What there is.
        name: Which one.
        asked_by: Who asks; begins the message.

    Raises:
        ValueError: If there is none of that name; names those there are.
    """
    if name not in metrics:
        known = ", ".join(map(repr, metrics)) or "none"
        raise ValueError(f"{asked_by}: there is no metric {name!r}. Known are: {known}.")
    return metrics[name]
