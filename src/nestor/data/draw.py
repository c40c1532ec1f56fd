"""One draw of a level: a batch and its random numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from nestor.autodiff.randomness import Randomness


class Draw(NamedTuple):
    """One batch, and the random numbers that every evaluation on it sees."""

    batch: Any
    randomness: Randomness
