"""Callbacks that follow the best value of a metric: early stopping, and copies of the best variables."""

import copy
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nestor.errors import NestorWarning
from nestor.errors.options import check_options, typed
from nestor.levels.level import Level
from nestor.program import Program
from nestor.training.callback import Callback
from nestor.training.run import Run
from nestor.training.weight_files import check_weights, write_weights

Mode = Literal["min", "max"]

# Metrics of which large values are good, as words of a name.
_LARGE_IS_GOOD = frozenset(
    [
        *("acc", "accuracy", "auc", "auroc", "ap", "map", "f1", "fbeta", "precision", "recall", "specificity"),
        *("sensitivity", "iou", "dice", "bleu", "rouge", "r2", "psnr", "ssim", "reward", "return"),
    ]
)


class EarlyStopping(Callback):
    """End the run when a metric has not improved in ``patience`` evaluations in a row.

    The metric ``"level/name"`` of a level is evaluated every ``every`` engine steps, once the level has stepped. Any
    other name is a metric of the validation, evaluated after each validation. The run ends after the present engine
    step, without an error and with ``engine.step`` below the requested number. A further ``engine.run`` keeps the best
    value and counts evaluations from zero again. If the callback ended a run, that run ends at once when it is resumed.
    List ``Checkpoint`` after ``EarlyStopping``, so that the checkpoint contains the state of ``EarlyStopping``.

    Args:
        metric: A key of ``engine.validation``, such as ``"accuracy"``, or a metric of a level, such as ``"net/loss"``.
        mode: ``"min"`` if small values are good, ``"max"`` if large values are good. None means ``"min"``, and is
            refused for a metric whose name says that large values are good (``"accuracy"``, ``"val/f1"``).
        patience: Evaluations in a row without an improvement that end the run.
        min_delta: The smallest improvement that counts, in units of the metric.
        every: Engine steps between two evaluations of a level's metric. Reading it waits for the device.

    Attributes:
        best: The best value so far; None before the first evaluation.
        best_step: The engine step of the best value.
        stopped_at: The engine step at which the callback ended the last run; None if the callback did not end it.

    Raises:
        ValueError: If an option is out of range, or ``mode`` is missing; in the run, if there is no such metric or no
            validation.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> stop = nestor.callbacks.EarlyStopping("net/loss", patience=2, min_delta=0.1)
        >>> metrics = nestor.Engine(program, callbacks=[stop], seed=0).run(100)
        >>> stop.best_step, stop.stopped_at
        (5, 7)
    """

    @typed
    def __init__(
        self, metric: str, mode: Mode | None = None, patience: int = 5, *, min_delta: float = 0.0, every: int = 1
    ) -> None:
        self.metric = metric
        self.mode = _mode_of(self, metric, mode)
        self.patience, self.min_delta, self.every = patience, min_delta, every
        check_options(self, counts=["patience", "every"], tolerances=["min_delta"])
        self.best: float | None = None
        self.best_step: int | None = None
        self.stopped_at: int | None = None
        self._without_improvement = 0

    def is_due(self, engine: Run, step: int) -> bool:
        return self._level(engine) is not None and step % self.every == 0

    def on_start(self, engine: Run) -> None:
        if self._level(engine) is None and not engine.validate_every:
            raise ValueError(
                f"EarlyStopping({self.metric!r}) needs validations, but with Engine(validate_every=0) there are none "
                "during a run. Give validate=... and validate_every=..., or choose a metric of a level: "
                f"{', '.join(repr(f'{name}/loss') for name in engine.states)}."
            )
        if self.stopped_at is not None and engine.is_resuming:
            engine.last_step = engine.step
        elif self.stopped_at is not None:
            self._without_improvement, self.stopped_at = 0, None

    def on_step(self, engine: Run) -> None:
        level = self._level(engine)
        if level is not None and engine.step % self.every == 0 and engine.states[level].metrics.gradient is not None:
            self._evaluate(engine, engine.read_all_metrics())

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        if self._level(engine) is None:
            self._evaluate(engine, metrics)

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self.best, "best_step": self.best_step}
        return {**best, "without_improvement": self._without_improvement, "stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self._without_improvement, self.stopped_at = state["without_improvement"], state["stopped_at"]

    def _level(self, engine: Run) -> str | None:
        """Return the level that the metric belongs to; None if it belongs to the validation."""
        level, slash, _ = self.metric.partition("/")
        return level if slash and level in engine.states else None

    def _evaluate(self, engine: Run, metrics: dict[str, float]) -> None:
        value = _choose(metrics, self.metric, asked_by=f"EarlyStopping({self.metric!r})")
        if _is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.best_step, self._without_improvement = value, engine.step, 0
            return
        self._without_improvement += 1
        if self._without_improvement >= self.patience and engine.step < engine.last_step:
            self.stopped_at = engine.last_step = engine.step


class BestWeights(Callback):
    """Copy the modules of all levels, with their buffers, to the CPU at the best validation.

    The callback takes a new copy at every validation that is better than all earlier ones. It does not copy optimizer
    states: if a run continues after ``restore``, the optimizers continue with their present states.

    Args:
        metric: A key of ``engine.validation``, such as ``"accuracy"``.
        mode: ``"min"`` if small values are good, ``"max"`` if large values are good. None means ``"min"``, and is
            refused for a metric whose name says that large values are good (``"accuracy"``, ``"val/f1"``).
        restore: Whether to copy the best variables back into the modules at the end of ``engine.run``, unless an error
            ended the run.
        folder: A folder for the modules at the best validation, as files that :class:`SaveWeights` describes. They are
            replaced at every better validation.

    Attributes:
        best: The best value so far; None before the first validation.
        best_step: The engine step of the best value.

    Raises:
        ValueError: If ``mode`` is unknown or missing; in the run, if a validation returns no such metric.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> best = nestor.callbacks.BestWeights("distance", restore=True)
        >>> validate = lambda net: {"distance": (net() - 0.25).abs().sum()}
        >>> metrics = nestor.Engine(program, callbacks=[best], validate=validate, validate_every=1, seed=0).run(4)
        >>> best.best_step, net.value.tolist()
        (2, [0.25, 0.25])
    """

    @typed
    def __init__(
        self,
        metric: str,
        mode: Mode | None = None,
        *,
        restore: bool = False,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.metric = metric
        self.mode = _mode_of(self, metric, mode)
        self.restore_at_end = restore
        self.folder = None if folder is None else Path(folder)
        self.best: float | None = None
        self.best_step: int | None = None
        self._copies: dict[str, Any] | None = None

    def on_start(self, engine: Run) -> None:
        if self.folder is not None:
            check_weights(_levels(engine).values(), engine.runtime)

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        value = _choose(metrics, self.metric, asked_by=f"BestWeights({self.metric!r})")
        if _is_better(value, self.best, self.mode):
            self.best, self.best_step = value, engine.step
            with engine.runtime.whole_modules():
                self._copies = _copy_levels(_levels(engine))
            if self.folder is not None:
                write_weights(self.folder, _levels(engine), engine.runtime)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if not self.restore_at_end or error is not None:
            return
        if self._copies is not None:
            self.restore(engine)
            return
        warnings.warn(
            f"BestWeights({self.metric!r}, restore=True) has nothing to restore: no validation returned a number. "
            "Give Engine validate=... and validate_every=...",
            NestorWarning,
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "kept": self._copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self._copies = state["best"], state["best_step"], state["kept"]

    def restore(self, target: Program | Run) -> None:
        """Copy the best variables and buffers into the modules of a program.

        Args:
            target: The observed program or engine, or one with the same levels and modules of the same shapes.

        Raises:
            RuntimeError: If there is no copy, or a module has other shapes.
            ValueError: If the program has other levels.
        """
        if self._copies is None:
            raise RuntimeError(
                f"BestWeights({self.metric!r}).restore: nothing was kept, because there was no validation. Pass the "
                "callback to Engine(callbacks=[...], validate=..., validate_every=...) and run."
            )
        levels, modules, tasks = _levels(target), self._copies["modules"], self._copies["tasks"]
        if levels.keys() != modules.keys():
            own, kept = ", ".join(levels), ", ".join(modules)
            raise ValueError(f"BestWeights.restore: the program has the levels {own}; kept were those of {kept}.")
        for name, level in levels.items():
            level.problem.module.load_state_dict(modules[name])
            with torch.no_grad():
                for parameter, value in zip(level.parameters, tasks.get(name, ()), strict=False):
                    parameter.copy_(value)


def _levels(target: Program | Run) -> Mapping[str, Level]:
    if isinstance(target, Program):
        return target.levels
    return {name: state.level for name, state in target.states.items()}


def _copy_levels(levels: Mapping[str, Level]) -> dict[str, Any]:
    """Copy the state of every module, and the stacked variables of every level with tasks, to the CPU."""
    modules = {level.problem.module for level in levels.values()}  # levels that share a module share its copy
    copies = {module: {key: _copy(value) for key, value in module.state_dict().items()} for module in modules}
    with_tasks = {name: level for name, level in levels.items() if level.problem.tasks is not None}
    return {
        "modules": {name: copies[level.problem.module] for name, level in levels.items()},
        "tasks": {name: list(map(_copy, level.parameters)) for name, level in with_tasks.items()},
    }


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _mode_of(callback: Callback, metric: str, mode: Mode | None) -> Mode:
    """Return which values of a metric are good."""
    if mode is None:
        if _LARGE_IS_GOOD.isdisjoint(re.split(r"[^a-z0-9]+", metric.lower())):
            return "min"
        call = f"{type(callback).__name__}({metric!r}"
        raise ValueError(
            f"{call}) would look for the smallest value, and the name says that large values are good. Write {call}, "
            "mode='max') for the largest value, or mode='min' for the smallest."
        )
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} must be 'min' (a loss) or 'max' (an accuracy).")
    return mode


def _is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Return True if ``value`` is better than ``best`` by more than ``min_delta``; False for NaN."""
    if best is None or math.isnan(value):
        return not math.isnan(value)
    # The difference of two equal infinities is NaN, which is not greater than min_delta.
    return (best - value if mode == "min" else value - best) > min_delta


def _choose(metrics: dict[str, float], name: str, *, asked_by: str) -> float:
    """Return the metric ``name``. The error message begins with the caller, ``asked_by``."""
    if name in metrics:
        return metrics[name]
    raise ValueError(f"{asked_by}: there is no metric {name!r}. Known are: {', '.join(map(repr, metrics)) or 'none'}.")
