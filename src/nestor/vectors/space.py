"""Vector spaces: inner products and norms, which know how entries are split among processes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_compiling, is_tracing
from nestor.autodiff.torch_private import foreach_norm
from nestor.vectors.algebra import Params, are_finite, holds_finite


class VectorSpace(ABC):
    """The operations on whole vectors that depend on how the entries are split among processes."""

    @abstractmethod
    def dot(self, a: Params, b: Params) -> Tensor:
        """Return the inner product, a real scalar tensor; of complex vectors, that of real and imaginary parts."""

    @abstractmethod
    def norm(self, a: Params) -> Tensor:
        """Return the Euclidean norm, a scalar tensor."""

    @abstractmethod
    def largest(self, a: Params) -> Tensor:
        """Return the largest absolute value of the entries, a scalar tensor."""

    @abstractmethod
    def holds_finite(self, a: Params) -> bool:
        """Return whether all entries are finite; this waits for the device. The answer is equal on all processes."""

    @abstractmethod
    def are_finite(self, a: Params) -> Tensor:
        """Return, for each tensor, whether all its entries are finite; the answer is equal on all processes."""

    @abstractmethod
    def differentiable_norm(self, a: Params) -> Tensor:
        """Return the Euclidean norm, by operations with correct derivatives in reverse and in forward mode."""

    @abstractmethod
    def replicate(self, scalar: Tensor) -> Tensor:
        """Return a scalar that is equal on all processes, for use on shards; its cotangent is the sum of all theirs."""

    @abstractmethod
    def lengths(self, like: Params) -> Sequence[int]:
        """Return the number of entries of each tensor of a vector like ``like``, including those on other processes."""

    @abstractmethod
    def gather(self, shards: Params) -> list[Tensor]:
        """Return whole tensors, without a graph, for shards that are flattened along the last dimension."""

    @abstractmethod
    def shard(self, tensors: Params) -> list[Tensor]:
        """Return this process's shards of tensors flattened along the last dimension: the inverse of :meth:`gather`."""

    def flat(self, vector: Params) -> Tensor:
        """Join a vector into one whole tensor of shape ``(n,)``."""
        return torch.cat(self.gather([part.reshape(-1) for part in vector]), dim=-1)

    def flat_many(self, vectors: Params) -> Tensor:
        """Join ``k`` stacked vectors into one whole tensor of shape ``(k, n)``."""
        return torch.cat(self.gather([part.reshape(len(part), -1) for part in vectors]), dim=-1)

    def parts(self, values: Tensor, like: Params) -> list[Tensor]:
        """Cut a whole tensor of shape ``(..., n)`` into vectors like ``like``, stacked along the leading shape."""
        pieces = self.shard(torch.split(values, list(self.lengths(like)), dim=-1))
        stacked = values.shape[:-1]
        return [p.reshape((*stacked, *part.shape)).to(part.dtype) for p, part in zip(pieces, like, strict=True)]


@dataclass(frozen=True)
class LocalSpace(VectorSpace):
    """The space of vectors whose entries are all on this process."""

    def dot(self, a: Params, b: Params) -> Tensor:
        """Add up the products of the entries."""
        if len(a) == 1 == len(b):
            return _dot(a[0], b[0])
        return torch.stack([_dot(x, y) for x, y in zip(a, b, strict=True)]).sum()

    def norm(self, a: Params) -> Tensor:
        """Combine the fused norms of the tensors."""
        if len(a) == 1:
            only: Tensor = torch.linalg.vector_norm(a[0])
            return only
        if is_compiling():
            # The compiler fuses sums of squares with what is around them, and calls the fused norms one by one.
            root: Tensor = torch.stack([(x * x.conj()).real.sum() if x.is_complex() else (x * x).sum() for x in a])
            return root.sum().sqrt()
        length: Tensor = torch.linalg.vector_norm(torch.stack(foreach_norm(list(a))))
        return length

    def largest(self, a: Params) -> Tensor:
        """Take the largest of the maximum norms; zero without entries."""
        found = [torch.linalg.vector_norm(x, math.inf) for x in a if x.numel()]
        return torch.stack(found).max() if found else a[0].new_zeros(())

    def holds_finite(self, a: Params) -> bool:
        """Test the entries."""
        return holds_finite(a)

    def are_finite(self, a: Params) -> Tensor:
        """Test the entries."""
        return are_finite(a)

    def differentiable_norm(self, a: Params) -> Tensor:
        # Not the fused norms: their forward-mode rule is wrong in torch 2.13.
        length: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in a]))
        return length

    def replicate(self, scalar: Tensor) -> Tensor:
        """Return the scalar itself."""
        return scalar

    def lengths(self, like: Params) -> Sequence[int]:
        """Count the entries."""
        return [part.numel() for part in like]

    def gather(self, shards: Params) -> list[Tensor]:
        """Return the tensors themselves."""
        return list(shards)

    def shard(self, tensors: Params) -> list[Tensor]:
        """Return the tensors themselves."""
        return list(tensors)


LOCAL = LocalSpace()
"""The space of vectors whose entries are all on this process."""


def _dot(x: Tensor, y: Tensor) -> Tensor:
    # torch.dot is not used in half precision, where it does not accumulate in single precision, and not for unaligned
    # vectors, for which BLAS rounds differently from call to call.
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != y.dtype or is_tracing() or not _is_aligned(x):
        return (x * y.conj()).sum().real if x.is_complex() else (x * y).sum()
    if y is not x and not _is_aligned(y):
        return (x * y).sum()
    return torch.dot(x, y) if x.dim() == 1 else torch.dot(x.view(-1), y.view(-1))


def _is_aligned(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 64 == 0
