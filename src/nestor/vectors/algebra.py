"""Vector algebra: elementwise operations on lists of tensors."""

import cmath
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
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


def split(leaves: Iterable[T], sizes: Sequence[int]) -> list[list[T]]:
    """Cut a flat list into consecutive pieces of the given lengths."""
    rest = iter(leaves)
    return [list(islice(rest, size)) for size in sizes]


@dataclass(frozen=True)
class InputLayout:
    """The levels whose variables are the flat inputs of a level, in order, and how many variables each has."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    def by_level(self, flat: Sequence[T]) -> dict[str, list[T]]:
        """Group flat inputs by level."""
        found: dict[str, list[T]] = {}
        start = 0
        for name, size in self.sizes.items():
            found[name] = list(flat[start : start + size])
            start += size
        return found

    def flat(self, values: Mapping[str, Sequence[T | None]]) -> list[T | None]:
        """List values in the order of the flat inputs; None for the variables of a level without values."""
        found: list[T | None] = []
        for name, size in self.sizes.items():
            known = values.get(name)
            found.extend([None] * size if known is None else known)
        return found


def size(a: Params) -> int:
    """Return the number of elements."""
    return sum(map(torch.numel, a))


def zeros_for_none(values: Sequence[Tensor | None], like: Params) -> list[Tensor]:
    """Replace every None by zeros with the shape of its tensor in ``like``."""
    return [torch.zeros_like(p) if v is None else v for v, p in zip(values, like, strict=True)]


def present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the entries that are not None."""
    return [v for v in values if v is not None]


def is_zero(values: Sequence[Tensor | None]) -> bool:
    """Return whether all entries of a vector are None, which means zero."""
    for value in values:  # noqa: SIM110 - a generator would take longer than the comparisons
        if value is not None:
            return False
    return True


def consume(values: Sequence[T], *, may_overwrite: bool) -> Iterator[T]:
    """Iterate over a sequence. With ``may_overwrite``, remove each entry of a list, so that it is freed after use."""
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
    """Return ``factor * a``."""
    if len(a) == 1:  # for one tensor a fused operation is slower than the plain one
        return [a[0] * factor]
    return list(foreach_mul(list(a), factor))


def negative(a: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return ``-a``, where None means zero."""
    return [None if t is None else -t for t in a]


def add(a: Params, b: Params) -> list[Tensor]:
    """Return ``a + b``."""
    if len(a) == 1 == len(b):
        return [a[0] + b[0]]
    return list(foreach_add(list(a), list(b)))


def subtract(a: Params, b: Params) -> list[Tensor]:
    """Return ``a - b``."""
    if len(a) == 1 == len(b):
        return [a[0] - b[0]]
    return list(foreach_sub(list(a), list(b)))


def axpy(factor: float | Tensor, x: Params, y: Params) -> list[Tensor]:
    """Return ``factor * x + y``."""
    if isinstance(factor, Tensor):
        return add(y, scale(factor, x))
    if len(x) == 1 == len(y):
        return [torch.add(y[0], x[0], alpha=factor)]
    return list(foreach_add(list(y), list(x), alpha=factor))


def holds_finite(a: Params) -> bool:
    """Return whether all entries are finite; this waits for the device."""
    # A sum is the fastest reduction. It is not finite if an entry is not; if it overflows, each entry is tested.
    for t in a:  # noqa: SIM110 -- a generator takes half a microsecond longer
        if not cmath.isfinite(t.detach().sum()) and not bool(torch.isfinite(t).all()):
            return False
    return True


def are_finite(a: Params) -> Tensor:
    """Return, for each tensor, whether all its entries are finite: booleans of shape ``(len(a),)``, not read."""
    if is_tracing():
        return torch.stack([torch.isfinite(t).all() for t in a])
    if a[0].device.type == "cpu":
        return torch.tensor([holds_finite([t]) for t in a])
    # The maximum norm does not overflow; torch defines none for tensors without entries.
    some = [t for t in a if t.numel()]
    found = iter(foreach_norm(some, math.inf)) if some else iter(())
    return torch.stack([torch.isfinite(next(found)) if t.numel() else t.new_ones((), dtype=torch.bool) for t in a])


def is_large(values: Params) -> bool:
    """Return whether a vector is so large that operations should avoid a temporary copy of it."""
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
    """Return new graph nodes for ``values``: a view of each tensor that has a graph, a leaf for each other tensor.

    A derivative with respect to these nodes is a *partial* derivative: the reverse pass stops at them.
    """
    return [v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for v in values]


def leaves(values: Params) -> list[Tensor]:
    """Return leaves that share the memory of ``values`` and have no graph."""
    return [v.detach().requires_grad_() for v in values]
