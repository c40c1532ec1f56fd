"""Losses that change what the next evaluation reads: the modes of modules (train, eval), and the batch."""

from collections.abc import Callable
from typing import Any

from torch import nn

from nestor.data.containers import fresh


class Modes:
    """The modes of all modules within a module, at the time when the object is made."""

    def __init__(self, root: nn.Module) -> None:
        self._before = [(module, module.training) for module in root.modules()]

    @property
    def have_changed(self) -> bool:
        """Whether a module has another mode now."""
        return any(module.training != mode for module, mode in self._before)

    def restore(self) -> None:
        """Set all modules to the modes that they had."""
        for module, mode in self._before:
            module.training = mode


class ModeKeeper:
    """A loss that sets modes, as in ``net.eval()``; after each evaluation, all modules have the modes that they had.

    The mode would otherwise be that of the next evaluation of another level's loss, among them those of a response,
    which would then differentiate another loss than that of the step.

    Args:
        function: The loss.
        root: Contains the modules that it reads.
    """

    def __init__(self, function: Callable[..., Any], root: nn.Module) -> None:
        self._function, self._root = function, root

    def __call__(self, *batch: Any, **modules: Any) -> Any:
        """Evaluate the loss."""
        modes = Modes(self._root)
        try:
            return self._function(*batch, **modules)
        finally:
            modes.restore()


class BatchKeeper:
    """A loss that takes its batch apart, as in ``batch.pop("labels")``: every evaluation gets containers of its own.

    Args:
        function: The loss.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *batch: Any, **modules: Any) -> Any:
        """Evaluate the loss."""
        return self._function(*fresh(batch), **modules)
