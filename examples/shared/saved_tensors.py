"""The memory of the tensors that autograd keeps for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes of the tensors that graphs keep; ``peak`` is the largest sum.

    Dense tensors only. A tensor that several operations keep is counted once.
    """

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.bytes = self.peak = 0
        super().__init__(lambda tensor: Kept(tensor, self), lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensors:
        super().__enter__()
        return self


class Kept:
    """A tensor that is kept, until the graph lets go of it."""

    def __init__(self, tensor: Tensor, counter: SavedTensors) -> None:
        self.tensor, self.counter = tensor, counter
        self.address = tensor.data_ptr() if tensor.layout is torch.strided else None
        if self.address is not None:
            count = counter.held.get(self.address, 0)
            counter.held[self.address] = count + 1
            if count == 0:
                counter.bytes += tensor.untyped_storage().nbytes()
                counter.peak = max(counter.peak, counter.bytes)

    def __del__(self) -> None:
        if self.address is None:
            return
        self.counter.held[self.address] -= 1
        if self.counter.held[self.address] == 0:
            self.counter.bytes -= self.tensor.untyped_storage().nbytes()
