"""Seeds: integers, such as the number of a draw, hashed to the seed of a generator."""

from collections.abc import Callable
from functools import reduce


def seeds(*numbers: int) -> Callable[[int], int]:
    """Return the function from the index of a draw to its seed: ``seeds(*numbers)(index) == mix(*numbers, index)``."""
    start = reduce(_absorb, numbers, 0)
    return lambda index: _absorb(start, index) >> 1


def mix(*numbers: int) -> int:
    """Hash integers to a seed by splitmix64: similar numbers give unrelated seeds."""
    return reduce(_absorb, numbers, 0) >> 1  # 63 bits: torch.manual_seed expects a signed integer


_MASK = (1 << 64) - 1


def _absorb(state: int, number: int) -> int:
    state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
