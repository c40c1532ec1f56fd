"""The mutable state of one level during a run."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestor.distributed import Runtime
from nestor.errors import NestorWarning
from nestor.levels.level import Gradient, Level
from nestor.levels.needed_history import needed_history
from nestor.optim.history import Buffers, Histories, HistoryBuilder, LevelHistory, StepRecord
from nestor.optim.rules import copy_slot
from nestor.optim.state import State
from nestor.solvers import SolveState
from nestor.training.kept_derivatives import KeptDerivatives
from nestor.training.level_draws import draws_of
from nestor.training.snapshot import Snapshot
from nestor.vectors import Params


class OptimizerMemory:
    """Momentum, second moments and counters of one level.

    The level's optimizer stores them. For a user's rule, and for an optimizer of stacked tasks, this object does.

    Args:
        level: The level.
        held: A memory that this object stores for any rule: the placeholders of a trace.

    Attributes:
        slots: The memory that this object stores, one mapping for each variable (any number, for a user's rule).
    """

    def __init__(self, level: Level, held: list[dict[str, Any]] | None = None) -> None:
        self.slots: list[Mapping[str, Any]] = list(held or ())
        self._level = level
        self._in_optimizer = held is None and level.stepping.optimizer_has_memory

    def read(self) -> Sequence[Mapping[str, Any]]:
        """Return the memory without copying it, one mapping for each variable."""
        stepping, parameters = self._level.stepping, self._level.parameters
        if self._in_optimizer:
            return stepping.optimizer_slots(parameters)
        return self.slots or stepping.rule().first_slots(len(parameters))

    def copies(self) -> list[dict[str, Any]]:
        """Copy the memory."""
        return [copy_slot(slot) for slot in self.read()]

    def read_state(self) -> State:
        """Return the current variables and the memory without copying them."""
        return State(self._level.parameters, self.read())

    def state(self) -> State:
        """Copy the current variables and the memory."""
        return State(self._level.copies(), self.copies() if self._in_optimizer else self.read())

    def write(self, slots: Sequence[Mapping[str, Any]]) -> None:
        """Replace the memory."""
        optimizer = self._level.stepping.optimizer
        if optimizer is None or not self._in_optimizer:
            self.slots = list(slots)
            return
        for parameter, slot in zip(self._level.parameters, slots, strict=True):
            if slot:
                optimizer.state[parameter].update(slot)

    def clear(self) -> None:
        """Remove the memory, of all steps so far."""
        self.slots = []
        if (optimizer := self._level.stepping.optimizer) is not None:
            optimizer.state.clear()


class LevelMetrics:
    """The latest measurements of one level.

    Args:
        level: The level.

    Attributes:
        first_norm: Norm of the gradient of the first step.
        callback_metrics: Metrics that callbacks have computed, by name.
        has_warned: Whether the warning that the level is far from a stationary point was issued.
    """

    def __init__(self, level: Level) -> None:
        self._gradient: Gradient | None = None
        self._later: Callable[[], Gradient] | None = None
        self.first_norm: Tensor | None = None
        self.callback_metrics: dict[str, Tensor] = {}
        self._level = level
        self.has_warned = False

    @property
    def gradient(self) -> Gradient | None:
        """Loss, metrics and norm of the gradient of the last step; None before the first step."""
        if self._later is not None:
            self.gradient = self._later()
        return self._gradient

    @gradient.setter
    def gradient(self, gradient: Gradient | None) -> None:
        self._gradient, self._later = gradient, None

    def record_later(self, gradient: Callable[[], Gradient]) -> None:
        """Store a function that returns the scalars of a step that is not the first one; they are seldom read."""
        self._later = gradient

    def record(self, gradient: Gradient) -> None:
        """Store the scalars of a step, without its vectors."""
        if self.first_norm is None:
            self.first_norm = gradient.norm
        if gradient.values:
            gradient = Gradient(gradient.loss, gradient.metrics, [], gradient.norm, {})
        self.gradient = gradient

    def read(self, steps: int, solves: Mapping[str, SolveState]) -> dict[str, float]:
        """Read all metrics to Python numbers; this waits for the device.

        Args:
            steps: Number of optimizer steps taken, for a warning.
            solves: The states of the solves of levels below, with their residuals.
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
            if "truncated" in solve.stats:  # of all solves, not of the last one
                values[f"{lower}_truncated"] = solve.truncated
        numbers = {key: value.item() if isinstance(value, Tensor) else float(value) for key, value in values.items()}
        self._warn_of_truncated(numbers, solves)
        if level.links.upper_levels and level.response.assumes_stationarity and self.first_norm is not None:
            numbers["stationarity"] = numbers["gradient_norm"] / max(self.first_norm.item(), 1e-30)
            self._warn_if_far(numbers["stationarity"], steps)
        return numbers

    def _warn_of_truncated(self, numbers: Mapping[str, float], solves: Mapping[str, SolveState]) -> None:
        for lower, solve in solves.items():
            if numbers.get(f"{lower}_truncated") and not solve.has_warned:
                solve.has_warned = True
                residual = numbers.get(f"{lower}_residual", math.nan)
                warnings.warn(
                    f"Level {lower!r}, below {self._level.name!r}: {solve.notice} In the last solve, |b - A x| is "
                    f"{residual:.2g} |b|.",
                    NestorWarning,
                    stacklevel=5,
                )

    def _warn_if_far(self, stationarity: float, steps: int) -> None:
        if self.has_warned or steps < 20 or stationarity <= 0.5:
            return
        self.has_warned = True
        warnings.warn(
            f"Level {self._level.name!r}: after {steps} steps its gradient norm is still {stationarity:.2g} times that "
            f"of the first step, but {self._level.response.describe()} is exact only for a zero gradient. Raise "
            "warmup_steps or unroll_steps, or use Unrolled() or T1T2().",
            NestorWarning,
            stacklevel=4,
        )


class LevelState:
    """The mutable state of one level during a run.

    Args:
        level: The level.
        seed: The seed of the run.
        runtime: Splits batches among processes.

    Attributes:
        level: The level.
        draws: Its batches.
        memory: The memory of its update rule.
        metrics: The measurements of its steps.
        history: Its steps since a level above last stepped, as far back as its response needs; None if it needs none.
        kept: Which derivatives of its steps are kept.
        uppers_then: The variables, at this level's last steps, of levels above that have stepped since, if noted.
        steps: Number of optimizer steps taken, including those of a look-ahead.
        ready: The levels below that have completed their steps since this level last stepped.
        restarts: Whether a level above has stepped since the last step.
        snapshot: The state at the start of a look-ahead.
        solves: The state of the linear solve of each level below, for the next solve.
    """

    def __init__(self, level: Level, seed: int, runtime: Runtime) -> None:
        self.level = level
        self.draws = draws_of(level, seed, runtime)
        self.memory = OptimizerMemory(level)
        self.metrics = LevelMetrics(level)
        spec = needed_history(level) if level.links.upper_levels else None
        self.history = None if spec is None else HistoryBuilder(spec)
        self.kept = KeptDerivatives(level, self.history)
        self.uppers_then: dict[str, Params] = {}
        self.steps = 0
        self.ready: set[str] = set()
        self.restarts = True
        self.snapshot: Snapshot | None = None
        self.solves: dict[str, SolveState] = {}

    def is_ready_after(self, steps: int) -> bool:
        """Return whether the levels above may step after ``steps``: past the warm-up, ``unroll_steps`` are complete."""
        problem = self.level.problem
        return steps % problem.unroll_steps == 0 and steps > problem.warmup_steps

    @property
    def remaining_steps(self) -> int:
        """Number of steps until the levels above may step."""
        problem = self.level.problem
        return (max(self.steps, problem.warmup_steps) // problem.unroll_steps + 1) * problem.unroll_steps - self.steps

    def begin(self, start: Params | None) -> None:
        """Start the steps that follow a step of a level above.

        Args:
            start: Variables of another level to start from; None continues from the current variables.
        """
        self.restarts = False
        self.forget_steps()
        if start is not None:
            with torch.no_grad():
                for parameter, value in zip(self.level.parameters, start, strict=True):
                    parameter.copy_(value)
            self.memory.clear()

    def forget_steps(self) -> None:
        """Remove the steps so far from the history."""
        self.uppers_then = {}
        if self.history is not None:
            self.history.clear()

    def notes(self, name: str) -> bool:
        """Return whether the variables of a level above are needed as they are now, before that level steps.

        A replay of the recorded steps needs them. Without a history, the objectives of that level's peers need them.
        """
        needed = name in self.level.links.noted_uppers or (self.history is not None and not self.history.is_empty)
        return needed and name not in self.uppers_then

    def note(self, below: Histories) -> list[Buffers] | None:
        """Record the next step, if the response needs it; return the list to be filled with the buffers' values."""
        history = self.history
        if history is None:
            return None

        def state() -> State:
            if history.spec.slots:
                return self.memory.state()
            return State(self.level.copies(), [{} for _ in self.level.parameters])

        buffers: list[Buffers] = []
        draws = self.draws.latest
        record = StepRecord(draws, self.level.stepping.rule().at_step(draws[0].step), buffers, below)
        # With a loss scale a step may be skipped: the previous step is then the last one again.
        undone = self.level.loss.scaling is not None
        history.note(record, state, remaining=self.remaining_steps, may_be_undone=undone)
        return buffers

    def present_history(self, *, copied: bool = False) -> LevelHistory:
        """Return the history for the levels above; with ``copied``, it is valid after the variables have changed."""
        values = self.level.copies() if copied else None
        if self.history is None:
            return LevelHistory(self.draws.latest, values, uppers=self.uppers_then)
        slots = self.memory.copies if copied else self.memory.read
        return self.history.build(self.draws.latest, values, slots)._replace(uppers=self.uppers_then)

    def read_metrics(self) -> dict[str, float]:
        """Read the metrics of the last step to Python numbers; this waits for the device."""
        return self.metrics.read(self.steps, self.solves)
