"""Which derivatives the operations of a loss have: found by trying, and remembered for each level."""

import warnings
from dataclasses import dataclass, field

import torch

from nestor.autodiff.instruments import is_compiling, is_tracing
from nestor.autodiff.torch_private import DataDependentError
from nestor.errors import LossError, NestorError, NestorWarning


@dataclass(eq=False)
class Derivatives:
    """Remembers which methods cannot differentiate the loss of one level, and warns once for each.

    Some operations have no forward-mode rule or no second derivative. No list of them is complete, and their error
    messages change with the version of torch. A method that raises an error or returns no derivative is therefore
    compared with another method: if that one works, it is used from then on.

    Args:
        where: The loss, as ``name (file:line)``; empty if it is not known.

    Attributes:
        forward_is_right: Whether forward mode has worked, and agreed with reverse mode where there was a doubt.
        forward_pays: Whether forward mode is the cheaper one for the operations of the loss; None before it is known.
    """

    where: str = ""
    forward_is_right: bool = field(default=False, init=False)
    forward_pays: bool | None = field(default=None, init=False)
    _methods: set[str] = field(default_factory=set, init=False)

    def lack(self, method: str) -> bool:
        """Return whether the method was found not to work."""
        return method in self._methods

    def note(self, method: str) -> None:
        """Note that a method does not work, where the method that replaces it needs no option: nothing is said."""
        if not is_tracing() or is_compiling():
            self._methods.add(method)

    def fall_back(self, level: str, method: str, instead: str, reason: str) -> None:
        """Note that another method replaces ``method`` from now on, and warn.

        Args:
            level: Name of the level.
            method: The option that does not work, as ``name=value``.
            instead: The option that replaces it, with the same result.
            reason: Why.
        """
        if is_tracing():
            if not is_compiling():
                return  # what fails on tensors without values may work in a run
        else:
            self._methods.add(method)
        loss = f", loss {self.where}" if self.where else ""
        warnings.warn(
            f"Level {level!r}{loss}: the derivative is computed by {instead.partition('=')[2]}, not "
            f"{method.partition('=')[2]} ({reason}). The result is the same; set {instead} to silence this.",
            NestorWarning,
            stacklevel=2,
        )

    def missing_error(self, level: str, response: str, error: Exception) -> LossError:
        """Return the error for a loss that can be differentiated once, but not as a response does it."""
        if "modified by an inplace operation" in str(error):
            return LossError(
                f"{response} differentiates the graph of a step that was taken, and a tensor in it has been changed in "
                f"place since ({reason_of(error)}). Give a tensor that changes along the run a level of its own, make "
                "it a buffer, or replace it by a new tensor instead of writing into it.",
                level=level,
                where=self.where or None,
            )
        return LossError(
            f"{response} differentiates the loss twice, and an operation in it has no such derivative "
            f"({reason_of(error)}). Write response=FiniteDifference(), which needs first derivatives only; or "
            "Implicit(condition=Stationarity(curvature=FiniteDifferenceHessian())) for a solve; or replace the "
            "operation.",
            level=level,
            where=self.where or None,
        )


def reason_of(error: Exception) -> str:
    """Return the first sentence of an error: that of torch names the operation."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" because")[0].split(". ")[0].rstrip(".")


def is_final(error: Exception) -> bool:
    """Return whether no other method can succeed: the error names its reason itself, or memory is exhausted."""
    return isinstance(error, NestorError | MemoryError | torch.OutOfMemoryError | DataDependentError)
