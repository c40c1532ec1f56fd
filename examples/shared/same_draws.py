"""Initial networks and batches that are the same for every library, whatever random numbers it draws itself."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def network_of(make: Callable[[], nn.Module], seed: int, number: int) -> nn.Module:
    """Return the network that ``make`` initialises for a seed and a number; no generator moves."""
    with torch.random.fork_rng():
        torch.manual_seed(1_000_000 * (seed + 1) + number)
        return make()


class SameBatches:
    """Endless batches; the same seed gives the same ones in every iteration.

    Args:
        tensors: What a batch holds, along the first dimension.
        size: The length of a batch.
        seed: Of the draws, with replacement.
    """

    def __init__(self, *tensors: Tensor, size: int, seed: int) -> None:
        self.tensors, self.size, self.seed = tensors, size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            index = torch.randint(len(self.tensors[0]), (self.size,), generator=generator)
            yield tuple(tensor[index] for tensor in self.tensors)
