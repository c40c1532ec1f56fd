"""Vectors as one tensor, for dense linear algebra; whole ones, where processes hold shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.vectors import algebra
from nestor.vectors.algebra import Params


def flat(vector: Params) -> Tensor:
    """Join the parts of a vector into a tensor of shape ``(n,)``."""
    return _join([part.reshape(-1) for part in vector])


def flat_many(vectors: Params) -> Tensor:
    """Join the parts of ``k`` stacked vectors into a tensor of shape ``(k, n)``."""
    return _join([part.reshape(len(part), -1) for part in vectors])


def lengths(like: Params) -> Sequence[int]:
    """Count the elements of every part, of all processes."""
    sharing = algebra.shared()
    return [part.numel() for part in like] if sharing is None else sharing.lengths(like)


def parts(values: Tensor, like: Params) -> list[Tensor]:
    """Cut a tensor of shape ``(..., n)`` into the parts of vectors like ``like``, stacked along the leading shape."""
    pieces: Sequence[Tensor] = torch.split(values, list(lengths(like)), dim=-1)
    sharing = algebra.shared()
    if sharing is not None:
        pieces = sharing.cut(pieces, like)
    return [p.reshape((*values.shape[:-1], *part.shape)).to(part.dtype) for p, part in zip(pieces, like, strict=True)]


def _join(stretches: list[Tensor]) -> Tensor:
    sharing = algebra.shared()
    return torch.cat(stretches if sharing is None else sharing.join(stretches), dim=-1)
