"""The space of vectors that processes hold shards of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nestor.distributed.collectives import ReplicatedScalar, SumShards, shard_length
from nestor.vectors import LOCAL, Params, VectorSpace


@dataclass(frozen=True, eq=False)
class ShardedSpace(VectorSpace):
    """Vectors like a level's variables, each tensor flattened and cut into one stretch a process.

    Attributes:
        sizes: Entries of each whole variable.
        group: The processes that hold the stretches, in their order.
    """

    sizes: Sequence[int]
    group: dist.ProcessGroup

    def dot(self, a: Params, b: Params) -> Tensor:
        """Add up the shards' inner products, differentiably."""
        total: Tensor = SumShards.apply(self.group, LOCAL.dot(a, b))  # type: ignore[no-untyped-call]
        return total

    def norm(self, a: Params) -> Tensor:
        """Return the root of the inner product."""
        root: Tensor = torch.sqrt(self.dot(a, a))
        return root

    def differentiable_norm(self, a: Params) -> Tensor:
        """Return the root of the inner product."""
        return self.norm(a)

    def replicate(self, scalar: Tensor) -> Tensor:
        """Return the scalar; its derivative adds up the shards'."""
        replicated: Tensor = ReplicatedScalar.apply(self.group, scalar)  # type: ignore[no-untyped-call]
        return replicated

    def lengths(self, like: Params) -> Sequence[int]:
        """Return the sizes of the whole variables."""
        return self.sizes

    def gather(self, shards: Params) -> list[Tensor]:
        """Gather the stretches, padded to the longest, which is the first."""
        processes = dist.get_world_size(self.group)
        whole = []
        for shard, size in zip(shards, self.sizes, strict=True):
            padded = shard.new_zeros((*shard.shape[:-1], shard_length(size, processes)))
            padded[..., : shard.shape[-1]] = shard.detach()
            found = [torch.empty_like(padded) for _ in range(processes)]
            dist.all_gather(found, padded, group=self.group)
            whole.append(torch.cat(found, dim=-1)[..., :size])
        return whole

    def shard(self, tensors: Params) -> list[Tensor]:
        """Take this process's stretches."""
        rank, processes = dist.get_rank(self.group), dist.get_world_size(self.group)
        lengths = [shard_length(size, processes) for size in self.sizes]
        return [t[..., rank * n : (rank + 1) * n] for t, n in zip(tensors, lengths, strict=True)]
