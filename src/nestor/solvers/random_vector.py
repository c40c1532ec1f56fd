"""Vectors of random numbers that depend on a seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

from nestor.vectors import algebra
from nestor.vectors.algebra import Params, VectorSpace


def random_like(space: VectorSpace, like: Params, seed: int, *, signs: bool = False) -> list[Tensor]:
    """Draw a vector of random numbers that depends on the seed alone: not on a generator's state, nor on processes."""
    generators: dict[torch.device, torch.Generator] = {}
    whole = []
    for length, t in zip(space.lengths(like), like, strict=True):
        if t.device not in generators:
            generators[t.device] = torch.Generator(device=t.device).manual_seed(seed)
        drawn = torch.randn(length, generator=generators[t.device], device=t.device, dtype=torch.float32).to(t.dtype)
        whole.append(torch.where(drawn > 0, 1.0, -1.0).to(t.dtype) if signs else drawn)
    return [shard.reshape(t.shape) for shard, t in zip(space.shard(whole), like, strict=True)]


def normalized(space: VectorSpace, vector: Params) -> list[Tensor]:
    """Scale a vector to length one; zero stays zero."""
    length = space.norm(vector)
    return algebra.scale(1 / torch.where(length == 0, 1.0, length), vector)
