"""The variables of the best validation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestor.callbacks.best import Best, Mode, choose
from nestor.callbacks.callback import Callback
from nestor.program import Program

if TYPE_CHECKING:
    from nestor.engine import Engine


@dataclass(frozen=True)
class _Kept:
    """Copies on the CPU: of every level's module, and of the tasks' variables of levels that have tasks."""

    modules: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, list[Tensor]]


class BestWeights(Callback):
    """Keep a copy of all levels' modules, buffers included, at the best validation.

    The copy lies in the host's memory and is taken whenever the validation is better than all before. Optimizers keep
    the state they have: a run that goes on after ``restore`` goes on with their present moments.

    Args:
        metric: A key of ``engine.validation``, such as ``"accuracy"``.
        mode: ``"min"`` if small values are good, ``"max"`` if large ones are.
        restore: Put the best variables back at the end of ``engine.run``, unless an error ended it.

    Attributes:
        best: The best value so far; None before the first validation.
        best_step: The engine step that it was seen at.

    Raises:
        ValueError: If ``mode`` is unknown; at a validation that has no such metric.
    """

    def __init__(self, metric: str, mode: Mode = "min", *, restore: bool = False) -> None:
        self.metric = metric
        self.restore_at_end = restore
        self.best_step: int | None = None
        self._best = Best(mode)
        self._kept: _Kept | None = None

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self._best.value

    def on_validation(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Take a copy if this validation is the best."""
        value = choose(metrics, self.metric, asked_by=f"BestWeights({self.metric!r})")
        if self._best.improved_by(value):
            self.best_step = engine.step
            self._kept = _keep(engine.program)

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Restore if that was asked for."""
        if not self.restore_at_end or error is not None:
            return
        if self._kept is None:
            warnings.warn(
                f"BestWeights({self.metric!r}, restore=True) has nothing to restore: there was no validation with a "
                "number. Give Engine validate=... and validate_every=...",
                stacklevel=2,
            )
            return
        self.restore(engine)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the copy."""
        kept = None if self._kept is None else {"modules": self._kept.modules, "tasks": self._kept.tasks}
        return {"best": self.best, "best_step": self.best_step, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._best.value = state["best"]
        self.best_step = state["best_step"]
        self._kept = None if state["kept"] is None else _Kept(**state["kept"])

    def restore(self, target: Program | Engine) -> None:
        """Copy the best variables and buffers into the modules of a program.

        Args:
            target: The program or engine that was watched, or one with the same levels and modules of the same shapes.

        Raises:
            RuntimeError: If nothing was kept, or a module does not fit.
            ValueError: If the program has other levels.
        """
        program = target if isinstance(target, Program) else target.program
        if self._kept is None:
            raise RuntimeError(
                f"BestWeights({self.metric!r}).restore: nothing was kept, since no validation was seen. Pass it to "
                "Engine(callbacks=[...], validate=..., validate_every=...) and run."
            )
        if program.levels.keys() != self._kept.modules.keys():
            raise ValueError(
                f"BestWeights.restore: the program has the levels {', '.join(program.levels)}; kept were those of "
                f"{', '.join(self._kept.modules)}."
            )
        for name, level in program.levels.items():
            level.problem.module.load_state_dict(self._kept.modules[name])
            with torch.no_grad():
                for parameter, value in zip(level.parameters, self._kept.tasks.get(name, ()), strict=False):
                    parameter.copy_(value)


def _keep(program: Program) -> _Kept:
    states: dict[int, Mapping[str, Any]] = {}  # levels may share a module: one copy is enough
    modules = {}
    for name, level in program.levels.items():
        module = level.problem.module
        if id(module) not in states:
            states[id(module)] = {key: _copy(value) for key, value in module.state_dict().items()}
        modules[name] = states[id(module)]
    tasks = {
        name: [p.detach().to("cpu", copy=True) for p in level.parameters]
        for name, level in program.levels.items()
        if level.problem.tasks is not None
    }
    return _Kept(modules, tasks)


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
