"""Checks that an engine can run a program: optimizers, data, validation."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import LBFGS

from nestor.explain.nested_cost import warn_of_nested_cost
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.signatures import level_arguments, location, read_parameters


def check_program(evaluator: Evaluator) -> None:
    """Check that the engine can step every level, and warn if a step is very costly.

    Raises:
        ValueError: If a level lacks an optimizer or data, or shares an optimizer with another level.
    """
    owner: dict[int, str] = {}
    for name, level in evaluator.levels.items():
        problem = level.problem
        if problem.optimizer is None and problem.update is None:
            raise ValueError(
                f"Level {name!r} has no optimizer, so the engine cannot step it: "
                "Problem(..., optimizer=torch.optim.Adam(module.parameters()))."
            )
        if isinstance(problem.optimizer, LBFGS):
            raise ValueError(f"Level {name!r}: LBFGS calls the loss itself and cannot be stepped; use SGD or Adam.")
        if problem.optimizer is not None and owner.setdefault(id(problem.optimizer), name) != name:
            raise ValueError(
                f"Levels {owner[id(problem.optimizer)]!r} and {name!r} share one optimizer; give each its own."
            )
        if problem.scheduler is not None and problem.scheduler.optimizer is not problem.optimizer:
            raise ValueError(f"Level {name!r}: its scheduler changes another optimizer than its own.")
        if level.loss.takes_batch and problem.data is None:
            raise ValueError(
                f"Level {name!r}, loss {level.loss.where}: its loss takes a batch, but the level has no data: "
                "Problem(..., data=loader)."
            )
    warn_of_nested_cost(evaluator)


def validation_arguments(validate: Callable[..., Any] | None, levels: Mapping[str, Level]) -> tuple[str, ...]:
    """List the levels whose modules a validation reads.

    Raises:
        ValueError: If an argument names no level.
    """
    if validate is None:
        return ()
    subject = f"validate {location(validate)}"
    return level_arguments(read_parameters(validate, levels, subject), levels, subject)


def call_it(callback: object) -> str:
    """Return a hint to call ``callback``, if it is a class."""
    return f"; write {callback.__name__}()" if isinstance(callback, type) else ""
