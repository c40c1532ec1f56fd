"""Vector algebra: operations entry by entry, and the space that knows where the entries are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.torch_private import (
    foreach_add,
    foreach_copy_,
    foreach_lerp_,
    foreach_mul,
    foreach_norm,
    foreach_sub,
)

T = TypeVar("T")

Params: TypeAlias = Sequence[Tensor]


def split(leaves: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """Cut a flat list into consecutive pieces of the given lengths."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(list(leaves[start : start + size]))
        start += size
    return pieces


@dataclass(frozen=True)
class InputLayout:
    """The levels whose variables are the flat inputs of a level, in order, and how many variables each has."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    def by_level(self, flat: Sequence[T]) -> dict[str, list[T]]:
        """Sort flat inputs by level."""
        return dict(zip(self.sizes, split(flat, list(self.sizes.values())), strict=True))

    def flat(self, values: Mapping[str, Sequence[T | None]]) -> list[T | None]:
        """Put values in the order of the flat inputs; None for the variables of a level without values."""
        found: list[T | None] = []
        for name, size in self.sizes.items():
            known = values.get(name)
            found.extend([None] * size if known is None else known)
        return found


def size(a: Params) -> int:
    """Count the elements."""
    return sum(t.numel() for t in a)


def zeros_for_none(values: Sequence[Tensor | None], like: Params) -> list[Tensor]:
    """Replace every missing gradient by zeros."""
    return [torch.zeros_like(p) if v is None else v for v, p in zip(values, like, strict=True)]


def present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Leave out what is None."""
    return [v for v in values if v is not None]


def consume(values: Sequence[T], *, may_overwrite: bool) -> Iterator[T]:
    """Iterate over a sequence; a list that ``may`` be overwritten is emptied, so that each entry is freed after use."""
    if not (may_overwrite and isinstance(values, list)):
        yield from values
        return
    values.reverse()
    while values:
        yield values.pop()


def copy_(targets: Params, values: Params) -> None:
    """Copy values into tensors, in place."""
    if len(targets) == 1:
        targets[0].copy_(values[0])
    else:
        foreach_copy_(list(targets), list(values))


def scale(factor: float | Tensor, a: Params) -> list[Tensor]:
    """``factor * a``."""
    if len(a) == 1:  # a fused operation on one tensor is slower than the plain one
        return [a[0] * factor]
    return list(foreach_mul(list(a), factor))


def negative(a: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``-a``, where ``None`` stands for zero."""
    return [None if t is None else -t for t in a]


def add(a: Params, b: Params) -> list[Tensor]:
    """``a + b``."""
    if len(a) == 1 == len(b):
        return [a[0] + b[0]]
    return list(foreach_add(list(a), list(b)))


def subtract(a: Params, b: Params) -> list[Tensor]:
    """``a - b``."""
    if len(a) == 1 == len(b):
        return [a[0] - b[0]]
    return list(foreach_sub(list(a), list(b)))


def axpy(factor: float | Tensor, x: Params, y: Params) -> list[Tensor]:
    """``factor * x + y``."""
    if isinstance(factor, Tensor):
        return add(y, scale(factor, x))
    if len(x) == 1 == len(y):
        return [torch.add(y[0], x[0], alpha=factor)]
    return list(foreach_add(list(y), list(x), alpha=factor))


def is_large(values: Params) -> bool:
    """Whether the memory of one more vector like ``values`` is worth the trouble of doing without it."""
    return sum(v.numel() for v in values) >= LARGE


LARGE = 2**16


def reflect_(values: Params, center: Params) -> None:
    """Replace ``values`` by ``2 center - values``, in place."""
    with torch.no_grad():
        if len(values) == 1:
            values[0].lerp_(center[0], 2.0)
        else:
            foreach_lerp_(list(values), list(center), 2.0)


def fresh(values: Params) -> list[Tensor]:
    """New graph nodes for ``values``: views that keep the graph of those that have one, leaves for the others.

    A derivative with respect to a fresh node is a *partial* derivative: it does not run on into the graph behind it.
    """
    return [v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for v in values]


def leaves(values: Params) -> list[Tensor]:
    """Leaves that share the memory of ``values`` and carry no graph."""
    return [v.detach().requires_grad_() for v in values]


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
        length: Tensor = torch.linalg.vector_norm(torch.stack(foreach_norm(list(a))))
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
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != y.dtype or is_tracing() or not _is_aligned(x):
        return (x * y).sum()
    if y is not x and not _is_aligned(y):
        return (x * y).sum()
    return torch.dot(x, y) if x.dim() == 1 else torch.dot(x.view(-1), y.view(-1))


def _is_aligned(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 64 == 0
