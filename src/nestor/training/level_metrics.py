"""What was measured at the steps of a level."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nestor.levels.gradient import Gradient
from nestor.levels.level import Level
from nestor.solvers import SolveState


class LevelMetrics:
    """The latest measurements of one level.

    Args:
        level: The level.

    Attributes:
        gradient: Loss, metrics and norm of the gradient of the last step; None before the first step.
        first_norm: Norm of the gradient of the first step.
        callback_metrics: Metrics that callbacks have measured, by name.
    """

    def __init__(self, level: Level) -> None:
        self.gradient: Gradient | None = None
        self.first_norm: Tensor | None = None
        self.callback_metrics: dict[str, Tensor] = {}
        self._level = level
        self._has_warned = False

    def record(self, gradient: Gradient) -> None:
        """Keep the numbers of a step, without its vectors."""
        if self.first_norm is None:
            self.first_norm = gradient.norm
        self.gradient = gradient.without_vectors()

    def read(self, steps: int, solves: Mapping[str, SolveState]) -> dict[str, float]:
        """Read all metrics to Python numbers; this waits for the device.

        Args:
            steps: Optimizer steps taken, for a warning.
            solves: The last solves of levels below, which report residuals.
        """
        if self.gradient is None:
            return {}
        level = self._level
        values: dict[str, Any] = {
            "loss": self.gradient.loss,
            "gradient_norm": self.gradient.norm,
            **self.gradient.metrics,
            **self.callback_metrics,
        }
        if (scaling := level.loss.scaling) is not None:
            values |= {"loss_scale": scaling.scale, "skipped": scaling.skipped}
        for lower, solve in solves.items():
            values |= {f"{lower}_{key}": value for key, value in solve.stats.items()}
        numbers = {key: value.item() if isinstance(value, Tensor) else float(value) for key, value in values.items()}
        if level.uppers and level.response.assumes_stationarity and self.first_norm is not None:
            numbers["stationarity"] = numbers["gradient_norm"] / max(self.first_norm.item(), 1e-30)
            self._warn_if_far(numbers["stationarity"], steps)
        return numbers

    def _warn_if_far(self, stationarity: float, steps: int) -> None:
        if self._has_warned or steps < 20 or stationarity <= 0.5:
            return
        self._has_warned = True
        warnings.warn(
            f"Level {self._level.name!r}: after {steps} steps its gradient is still {stationarity:.2g} times that of "
            f"its first step, and {self._level.response.describe()} is exact only where it vanishes. Raise "
            "warmup_steps or unroll_steps, or take Unrolled() or T1T2().",
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        kept = self.gradient
        return {
            "gradient": None if kept is None else {"loss": kept.loss, "metrics": dict(kept.metrics), "norm": kept.norm},
            "first_norm": self.first_norm,
            "callback_metrics": dict(self.callback_metrics),
            "has_warned": self._has_warned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the measurements of another run."""
        kept = state["gradient"]
        self.gradient = None if kept is None else Gradient(values=[], cotangents={}, **kept)
        self.first_norm, self.callback_metrics = state["first_norm"], dict(state["callback_metrics"])
        self._has_warned = state["has_warned"]
