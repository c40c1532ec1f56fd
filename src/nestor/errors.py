"""Errors of a run: they know which level and which step they belong to."""

from __future__ import annotations


class NestorError(RuntimeError):
    """A level could not be evaluated, differentiated or stepped.

    Callers that know the level or the step add it (:meth:`located`).

    Args:
        message: What happened, why, and how to mend it.
        level: Name of the level.
        where: The level's loss, as ``name (file:line)``.
        step: Engine step, counted from 1.
    """

    def __init__(
        self, message: str, *, level: str | None = None, where: str | None = None, step: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.level = level
        self.where = where
        self.step = step

    def located(self, *, level: str | None = None, where: str | None = None, step: int | None = None) -> NestorError:
        """Fill in what is not known yet; return the same error."""
        self.level = self.level or level
        self.where = self.where or where
        self.step = self.step or step
        return self

    def __str__(self) -> str:
        place = [f"level {self.level!r}"] if self.level else []
        if self.where:
            place.append(f"loss {self.where}")
        if self.step:
            place.append(f"step {self.step}")
        return f"[{', '.join(place)}] {self.message}" if place else self.message


class LossError(NestorError):
    """A loss returned something that cannot be minimised."""


class NonFiniteError(NestorError):
    """A loss, a cotangent or a hypergradient is NaN or infinite; the parameters are as before the step."""


class SolverError(NestorError):
    """A linear solver failed: negative curvature, divergence, a singular matrix."""


class NonFiniteSolveError(SolverError, NonFiniteError):
    """A linear solver was given, or came to, numbers that are not finite."""
