"""Placement of a level's variables: how they are split among processes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from nestor.vectors import LOCAL, Params, VectorSpace


class Placement(ABC):
    """Converts between this process's shards of the variables and the whole tensors that a loss reads."""

    space: VectorSpace = LOCAL
    """The space of vectors like this process's shards."""

    @abstractmethod
    def to_loss(self, variables: Params) -> Params:
        """Return whole tensors, differentiable to any order; the objective is the mean over all processes."""

    @abstractmethod
    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return whole tensors for vectors like the variables, without a derivative."""

    def usable(self, parameters: Params) -> AbstractContextManager[None]:
        """Return a context in which parameters of modules may be used, with values that the caller has set."""
        return nullcontext()

    @abstractmethod
    def shard(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return this process's shards of whole vectors, the inverse of :meth:`gather`."""
