"""The interface of a runtime: where the tensors of a program live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nestor.levels.evaluator import Evaluator


class Runtime(ABC):
    """Places a program on devices and processes.

    Attributes:
        rank: This process's number among those that share each batch.
        size: How many these are.
        holds_variables: Whether the variables live outside of the modules during a run.
    """

    holds_variables: bool = False
    rank: int = 0
    size: int = 1

    @abstractmethod
    def place(self, evaluator: Evaluator) -> Evaluator:
        """Return the program as this process runs it; called once, by the engine."""

    def data(self, data: Any) -> Any:
        """Return the data that this process draws from, so that it loads its share of each batch only."""
        return data

    def share(self, batch: Any) -> Any:
        """Take this process's share of a batch that was loaded whole."""
        return batch

    def agree(self, number: int) -> int:
        """Return the number that the first process holds."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def mean(self, numbers: list[float]) -> list[float]:
        """Average numbers over processes."""
        return numbers

    def begin(self) -> None:  # noqa: B027
        """Take the variables from the modules, at the start of a run."""

    def end(self) -> None:  # noqa: B027
        """Leave the variables in the modules, at the end of a run."""

    def whole_modules(self) -> AbstractContextManager[None]:
        """Let the modules hold whole variables inside, for validation, saving and loading."""
        return nullcontext()
