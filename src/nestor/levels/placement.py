"""Where a level's variables live, as its losses see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from nestor.vectors import LOCAL, Params, VectorSpace


class Placement(ABC):
    """Turns the variables that this process holds into the whole tensors that a loss reads."""

    space: VectorSpace = LOCAL
    """The space of vectors like the variables that this process holds."""

    @abstractmethod
    def to_loss(self, variables: Params) -> Params:
        """Return whole tensors; differentiable to any order, in the global objective: the mean over all processes."""

    @abstractmethod
    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return whole tensors for vectors like the variables, without a derivative."""

    @abstractmethod
    def shard(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Take this process's part of whole vectors, the inverse of :meth:`gather`."""
