"""Comparing a metric with its best value so far."""

from __future__ import annotations

import math
from typing import Literal

Mode = Literal["min", "max"]


def check_mode(mode: Mode, min_delta: float = 0.0) -> None:
    """Check the options of a comparison.

    Raises:
        ValueError: If ``mode`` is unknown, or ``min_delta`` is negative or not finite.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} must be 'min' (a loss) or 'max' (an accuracy).")
    if not (min_delta >= 0 and math.isfinite(min_delta)):
        raise ValueError(f"min_delta={min_delta!r} must be a finite number >= 0, in units of the metric.")


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Return True if ``value`` is better than ``best`` by more than ``min_delta``; False for NaN.

    Args:
        value: The new value.
        best: The best value so far; None before the first value.
        mode: ``"min"`` if small values are good, ``"max"`` if large values are good.
        min_delta: The smallest improvement that counts, in units of the metric.
    """
    if best is None or math.isnan(value):
        return not math.isnan(value)
    # The difference of two equal infinities is NaN, which is not greater than min_delta.
    return (best - value if mode == "min" else value - best) > min_delta


def choose(metrics: dict[str, float], name: str, *, asked_by: str) -> float:
    """Return the metric ``name``.

    Args:
        metrics: All metrics, by name.
        name: The name to find.
        asked_by: The caller; the error message begins with it.

    Raises:
        ValueError: If there is no metric ``name``; the message lists the known names.
    """
    if name in metrics:
        return metrics[name]
    raise ValueError(f"{asked_by}: there is no metric {name!r}. Known are: {', '.join(map(repr, metrics)) or 'none'}.")
