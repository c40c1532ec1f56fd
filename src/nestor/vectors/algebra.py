"""Vector algebra, entry by entry, on vectors of parameter space.

A vector is a flat list of tensors, one for each parameter, as the fused ``torch._foreach_*`` operations want it. What
needs all entries of a vector at once is the vector space's (:mod:`nestor.vectors.space`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Params: TypeAlias = Sequence[Tensor]


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


def scale(factor: float | Tensor, a: Params) -> list[Tensor]:
    """``factor * a``."""
    if len(a) == 1:  # a fused operation on one tensor is slower than the plain one
        return [a[0] * factor]
    return list(torch._foreach_mul(list(a), factor))


def negative(a: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``-a``, where ``None`` stands for zero."""
    return [None if t is None else -t for t in a]


def add(a: Params, b: Params) -> list[Tensor]:
    """``a + b``."""
    if len(a) == 1 == len(b):
        return [a[0] + b[0]]
    return list(torch._foreach_add(list(a), list(b)))


def subtract(a: Params, b: Params) -> list[Tensor]:
    """``a - b``."""
    if len(a) == 1 == len(b):
        return [a[0] - b[0]]
    return list(torch._foreach_sub(list(a), list(b)))


def axpy(factor: float | Tensor, x: Params, y: Params) -> list[Tensor]:
    """``factor * x + y``."""
    if isinstance(factor, Tensor):
        return add(y, scale(factor, x))
    if len(x) == 1 == len(y):
        return [torch.add(y[0], x[0], alpha=factor)]
    return list(torch._foreach_add(list(y), list(x), alpha=factor))


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
            torch._foreach_lerp_(list(values), list(center), 2.0)


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
