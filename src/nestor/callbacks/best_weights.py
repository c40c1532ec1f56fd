"""Copies of the variables at the best validation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestor.callbacks.best import Mode, check_mode, choose, is_better
from nestor.levels.level import Level
from nestor.program import Program
from nestor.training.callback import Callback
from nestor.training.run import Run


class BestWeights(Callback):
    """Copy the modules of all levels, with their buffers, to the CPU at the best validation.

    The callback takes a new copy at every validation that is better than all earlier ones. It does not copy optimizer
    states: if a run continues after ``restore``, the optimizers continue with their present states.

    Args:
        metric: A key of ``engine.validation``, such as ``"accuracy"``.
        mode: ``"min"`` if small values are good, ``"max"`` if large values are good.
        restore: Whether to copy the best variables back into the modules at the end of ``engine.run``, unless an error
            ended the run.

    Attributes:
        best: The best value so far; None before the first validation.
        best_step: The engine step of the best value.

    Raises:
        ValueError: If ``mode`` is unknown; in the run, if a validation returns no such metric.
    """

    def __init__(self, metric: str, mode: Mode = "min", *, restore: bool = False) -> None:
        check_mode(mode)
        self.metric = metric
        self.mode: Mode = mode
        self.restore_at_end = restore
        self.best: float | None = None
        self.best_step: int | None = None
        self._copies: dict[str, Any] | None = None

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        value = choose(metrics, self.metric, asked_by=f"BestWeights({self.metric!r})")
        if is_better(value, self.best, self.mode):
            self.best, self.best_step = value, engine.step
            self._copies = _copy_levels(_levels(engine))

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if not self.restore_at_end or error is not None:
            return
        if self._copies is not None:
            self.restore(engine)
            return
        warnings.warn(
            f"BestWeights({self.metric!r}, restore=True) has nothing to restore: no validation returned a number. "
            "Give Engine validate=... and validate_every=...",
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
