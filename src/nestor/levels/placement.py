"""Where a level's variables live, as its losses see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from nestor.vectors.algebra import Params
from nestor.vectors.space import LOCAL, VectorSpace


class Placement(ABC):
    """Turns the variables that this process holds into the whole tensors that a loss reads."""

    space: VectorSpace = LOCAL
    """The space of vectors like the variables that this process holds."""

    @abstractmethod
    def use(self, variables: Params) -> Params:
        """Return whole tensors; differentiable to any order, in the global objective: the mean over all processes."""

    @abstractmethod
    def whole(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return whole tensors for vectors like the variables, without a derivative."""

    @abstractmethod
    def part(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Take this process's part of whole vectors, the inverse of :meth:`whole`."""


class Local(Placement):
    """One process holds everything."""

    def use(self, variables: Params) -> Params:
        """Return them as they are."""
        return variables

    def whole(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return them as they are."""
        return list(values)

    def part(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return them as they are."""
        return list(values)
