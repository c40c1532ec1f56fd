"""Shuffled batches of tensors that lie in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Batches of tensors of equal length, shuffled anew in each pass; what is left over in the end is not used.

    Args:
        tensors: What a batch holds, along the first dimension.
        size: The length of a batch; that of the tensors, if they are shorter.
    """

    def __init__(self, *tensors: Tensor, size: int) -> None:
        self.tensors, self.size = tensors, min(size, len(tensors[0]))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.tensors[0]))
        for start in range(0, len(order) - self.size + 1, self.size):
            index = order[start : start + self.size]
            yield tuple(tensor[index] for tensor in self.tensors)
