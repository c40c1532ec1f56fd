"""The vector space of a level's variables: inner products, norms, and vectors as one tensor.

A vector is a list of tensors. A process holds every entry of it, or a shard of each tensor. What needs all entries
takes the space as an argument, so nothing about it is process-wide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.tracing import tracing
from nestor.vectors.algebra import Params


class VectorSpace(ABC):
    """What operations on whole vectors need to know of where their entries are."""

    @abstractmethod
    def dot(self, a: Params, b: Params) -> Tensor:
        """Return the inner product, a scalar tensor."""

    @abstractmethod
    def norm(self, a: Params) -> Tensor:
        """Return the Euclidean norm, a scalar tensor."""

    @abstractmethod
    def differentiable_norm(self, a: Params) -> Tensor:
        """Return the Euclidean norm by operations with correct rules in reverse and in forward mode."""

    @abstractmethod
    def replicate(self, scalar: Tensor) -> Tensor:
        """Return a scalar that all processes know, for use on their shards; its derivative is the sum of theirs."""

    @abstractmethod
    def lengths(self, like: Params) -> Sequence[int]:
        """Count the entries of every tensor of a vector like ``like``, those of other processes included."""

    @abstractmethod
    def gather(self, shards: Params) -> list[Tensor]:
        """Return the whole tensors, without a graph, for flattened shards of them along the last dimension."""

    @abstractmethod
    def shard(self, tensors: Params) -> list[Tensor]:
        """Return what this process holds of flattened tensors along the last dimension: the inverse of gathering."""

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
    """Vectors that this process holds whole."""

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
        length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(a))))
        return length

    def differentiable_norm(self, a: Params) -> Tensor:
        """Combine the norms of the tensors; the fused norms have a wrong forward-mode rule in torch 2.13."""
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
"""The space of vectors that this process holds whole."""


def _dot(x: Tensor, y: Tensor) -> Tensor:
    # Not in half precision, in which the sum of products is not kept in single precision; and not for vectors that
    # start anywhere in memory, for which BLAS rounds differently from one time to the next.
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != y.dtype or tracing() or not _is_aligned(x):
        return (x * y).sum()
    if y is not x and not _is_aligned(y):
        return (x * y).sum()
    return torch.dot(x, y) if x.dim() == 1 else torch.dot(x.view(-1), y.view(-1))


def _is_aligned(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 64 == 0
