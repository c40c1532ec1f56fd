"""Vectors of random numbers that depend on a seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

from nestor.solvers.flat import lengths, parts
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


def random_like(like: Params, seed: int, *, signs: bool = False) -> list[Tensor]:
    """Draw a vector of random numbers that depends on the seed alone, not on a generator's state."""
    if algebra.shared() is not None:
        # The whole vector, of which every process takes its stretch: the number of processes changes nothing.
        whole = [torch.empty(n, dtype=t.dtype, device=t.device) for n, t in zip(lengths(like), like, strict=True)]
        return parts(torch.cat(_draw(whole, seed, signs=signs)), like)
    return _draw(like, seed, signs=signs)


def _draw(like: Params, seed: int, *, signs: bool) -> list[Tensor]:
    generators: dict[torch.device, torch.Generator] = {}
    values = []
    for t in like:
        if t.device not in generators:
            generators[t.device] = torch.Generator(device=t.device).manual_seed(seed)
        drawn = torch.randn(t.shape, generator=generators[t.device], device=t.device, dtype=torch.float32).to(t.dtype)
        values.append(torch.where(drawn > 0, 1.0, -1.0).to(t.dtype) if signs else drawn)
    return values


def normalized(vector: Params) -> list[Tensor]:
    """Scale a vector to length one; zero stays zero."""
    length = algebra.norm(vector)
    return algebra.scale(1 / torch.where(length == 0, 1.0, length), vector)
