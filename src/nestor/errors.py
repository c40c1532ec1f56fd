"""Errors and warnings, with the level and the step at which they occurred, and the check of options."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Self


class NestorError(RuntimeError):
    """A level could not be evaluated, differentiated or stepped.

    Code that raises the error may not know the level or the step. A caller that knows them adds them with
    :meth:`located`. The text of the error begins with what is known.

    Args:
        message: What happened, why, and how to correct it.
        level: Name of the level.
        where: The level's loss, as ``name (file:line)``.
        step: Engine step, counted from 1.
    """

    def __init__(
        self, message: str, *, level: str | None = None, where: str | None = None, step: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.level, self.where, self.step = message, level, where, step

    def located(self, *, level: str | None = None, where: str | None = None, step: int | None = None) -> Self:
        """Set the attributes that are not set yet; return the same error. ``where`` is the loss of ``level``."""
        if level is None or self.level in (None, level):
            self.level, self.where = self.level or level, self.where or where
        self.step = self.step or step
        return self

    def __str__(self) -> str:
        place = {f"level {self.level!r}": self.level, f"loss {self.where}": self.where, f"step {self.step}": self.step}
        known = ", ".join(text for text, value in place.items() if value)
        return f"[{known}] {self.message}" if known else self.message


class LossError(NestorError):
    """A loss returned a value that cannot be minimised or differentiated."""


class NotAFunctionError(LossError):
    """A loss is no function of its arguments: other tensors, or the same ones again, give a value that differs.

    The hypergradient of such a loss is not defined. Usual reasons: random numbers of a generator that nestor does not
    replay, hooks that change gradients, a module that changes its own parameters or reads a copy of them.
    """


class ReplayError(NestorError):
    """A replayed step of a level differs from the step that was taken, so its derivative would be that of another step.

    Usual reasons: the step depends on something that changes along the run and that no level and no history contains.
    """


class UnsupportedError(NestorError, ValueError):
    """A program contains something that no response differentiates correctly; raised before the first step."""


class CheckpointError(NestorError):
    """A checkpoint cannot be written, read, or loaded into this program. The run has not changed."""


class NonFiniteError(NestorError):
    """A loss, a cotangent or a hypergradient is NaN or infinite. The step did not change the parameters."""


class SolverError(NestorError):
    """A linear solver failed: negative curvature, divergence, or a singular matrix."""


class SingularError(SolverError):
    """The matrix of a linear system is singular, and the right-hand side is not in its range."""


class NonFiniteSolveError(SolverError, NonFiniteError):
    """The input or an iterate of a linear solver is not finite."""


class NestorWarning(UserWarning):
    """A program runs, but something in it is probably not what its author means."""


def check_options(
    method: object, *, counts: Sequence[str] = (), tolerances: Sequence[str] = (), positive: Sequence[str] = ()
) -> None:
    """Check the options of a method; an option that is None is valid.

    Args:
        method: The object whose fields are the options.
        counts: Names of the options that must be integers of at least 1.
        tolerances: Names of the options that must be finite and not negative.
        positive: Names of the options that must be finite and positive.

    Raises:
        ValueError: If an option is out of range.
    """
    ranges: list[tuple[Sequence[str], Callable[[Any], bool], str]] = [
        (counts, lambda n: bool(n >= 1 and n is not True and isinstance(n, Integral)), "an integer of at least 1"),
        (tolerances, lambda value: 0 <= value < math.inf, "a finite number >= 0"),
        (positive, lambda value: 0 < value < math.inf, "positive and finite"),
    ]
    for names, is_valid, text in ranges:
        for name in names:
            value = getattr(method, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"{type(method).__name__}({name}={value!r}) must be {text}.")
