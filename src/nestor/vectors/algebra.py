"""Structures of tensors, and vector algebra on the flat lists that they become.

A vector of parameter space is a sequence of tensors, one for each parameter. The public functions take and return
nested lists, tuples and dicts; inside the library everything is flat, as the fused operations on lists
want it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from nestor.autodiff.torch_private import foreach_add, foreach_lerp_, foreach_mul, foreach_norm, foreach_sub
from nestor.autodiff.tracing import is_tracing

T = TypeVar("T")

Params: TypeAlias = Sequence[Tensor]
Tree: TypeAlias = "Tensor | Sequence[Tree] | Mapping[str, Tree]"


def flatten(structure: Tree) -> list[Tensor]:
    """List the tensors of a nested structure, depth first."""
    return list(_leaves(structure, path=""))


def _leaves(structure: Tree, path: str) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        for key, part in structure.items():
            yield from _leaves(part, f"{path}[{key!r}]")
    elif isinstance(structure, Sequence) and not isinstance(structure, str):
        for index, part in enumerate(structure):
            yield from _leaves(part, f"{path}[{index}]")
    else:
        raise TypeError(
            f"Expected a Tensor or a nested list, tuple or dict of Tensors, got {type(structure).__name__}"
            f"{f' at {path}' if path else ''}. Convert it with torch.as_tensor first."
        )


def unflatten(structure: Tree, leaves: Params) -> Tree:
    """Build a structure of the shape of ``structure`` from ``leaves``."""
    return _rebuild(structure, iter(leaves))


def _rebuild(structure: Tree, leaves: Iterator[Tensor]) -> Tree:
    if isinstance(structure, Tensor):
        return next(leaves)
    if isinstance(structure, Mapping):
        return {key: _rebuild(part, leaves) for key, part in structure.items()}
    parts = [_rebuild(part, leaves) for part in structure]
    if isinstance(structure, tuple):
        # A named tuple takes its fields one by one.
        return type(structure)(*parts) if type(structure) is not tuple else tuple(parts)
    return parts


def split(leaves: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """Cut a flat list into consecutive pieces of the given lengths."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(list(leaves[start : start + size]))
        start += size
    return pieces


def size(a: Params) -> int:
    """Count the elements."""
    return sum(t.numel() for t in a)


def zeros_for_none(values: Sequence[Tensor | None], like: Params) -> list[Tensor]:
    """Replace every missing gradient by zeros."""
    return [torch.zeros_like(p) if v is None else v for v, p in zip(values, like, strict=True)]


def drain(values: Sequence[T]) -> Iterator[T]:
    """Go through a list that nobody will need again: each entry may be freed before the next one is used.

    A sequence that cannot be changed is only gone through.
    """
    if not isinstance(values, list):
        yield from values
        return
    values.reverse()
    while values:
        yield values.pop()


class Sharing(ABC):
    """How processes that hold shards of every vector work on them together."""

    @abstractmethod
    def sum(self, value: Tensor) -> Tensor:
        """Add up a scalar's contributions of all processes, differentiably."""

    @abstractmethod
    def spread(self, value: Tensor) -> Tensor:
        """Hand a scalar that all processes know to their shards: its derivative is the sum of the shards'."""

    @abstractmethod
    def join(self, parts: Params) -> list[Tensor]:
        """Put vectors' shards, stacked along leading dimensions, together: the last dimension becomes the whole one."""

    @abstractmethod
    def cut(self, parts: Params, like: Params) -> list[Tensor]:
        """Take this process's shards of the last dimension, for vectors like ``like``."""

    @abstractmethod
    def lengths(self, like: Params) -> list[int]:
        """Count the elements of every part over all processes."""


# None where the vectors of this process are whole.
_sharing: Sharing | None = None


def share(sharing: Sharing | None) -> None:
    """Say that from now on the vectors of this process are shards, or, with None, that they are whole."""
    global _sharing  # noqa: PLW0603
    _sharing = sharing


def shared() -> Sharing | None:
    """Return how vectors are shared; None where they are whole."""
    return _sharing


def dot(a: Params, b: Params) -> Tensor:
    """Inner product, a scalar tensor."""
    if len(a) == 1 == len(b):
        local = _dot(a[0], b[0])
    else:
        local = torch.stack([_dot(x, y) for x, y in zip(a, b, strict=True)]).sum()
    return local if _sharing is None else _sharing.sum(local)


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


def norm(a: Params) -> Tensor:
    """Euclidean norm, a scalar tensor."""
    if _sharing is not None:
        root: Tensor = torch.sqrt(dot(a, a))
        return root
    if len(a) == 1:
        only: Tensor = torch.linalg.vector_norm(a[0])
        return only
    length: Tensor = torch.linalg.vector_norm(torch.stack(foreach_norm(list(a))))
    return length


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


def mirror(values: Params, center: Params) -> None:
    """Go to the other side of ``center``, as far from it: ``2 center - values``, in place."""
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


def accumulate(total: list[Tensor | None], values: Sequence[Tensor | None], factor: float = 1.0) -> list[Tensor | None]:
    """Add ``factor * values`` to ``total``, where ``None`` stands for zero."""
    scaled = values if factor == 1.0 else [None if v is None else v * factor for v in values]
    return [v if t is None else t if v is None else t + v for t, v in zip(total, scaled, strict=True)]
