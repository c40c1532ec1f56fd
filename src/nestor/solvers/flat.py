"""Vectors as one tensor, for dense linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from nestor.tree import Params


def flat(vector: Params) -> Tensor:
    """Join the parts of a vector into a tensor of shape ``(n,)``."""
    return torch.cat([part.reshape(-1) for part in vector])


def flat_many(vectors: Params) -> Tensor:
    """Join the parts of ``k`` stacked vectors into a tensor of shape ``(k, n)``."""
    return torch.cat([part.reshape(len(part), -1) for part in vectors], dim=1)


def parts(values: Tensor, like: Params) -> list[Tensor]:
    """Cut a tensor of shape ``(..., n)`` into the parts of vectors like ``like``, stacked along the leading shape."""
    pieces = torch.split(values, [part.numel() for part in like], dim=-1)
    return [p.reshape((*values.shape[:-1], *part.shape)).to(part.dtype) for p, part in zip(pieces, like, strict=True)]
