"""Variables on a mesh of processes: where they live, and the space of vectors like them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nestor.distributed import calls, collectives, freed
from nestor.levels.placement import Placement
from nestor.vectors import LOCAL, Params, VectorSpace, algebra


@dataclass(frozen=True, eq=False)
class ShardedSpace(VectorSpace):
    """Vectors like a level's variables, each tensor flattened and cut into one stretch per process.

    Attributes:
        sizes: Entries of each whole variable.
        group: The processes that hold the stretches, in their order.
    """

    sizes: Sequence[int]
    group: dist.ProcessGroup

    def dot(self, a: Params, b: Params) -> Tensor:
        """Add up the shards' inner products, differentiably."""
        return collectives.sum_shards(self.group, [LOCAL.dot(a, b)])[0]

    def norm(self, a: Params) -> Tensor:
        """Return the root of the inner product."""
        return torch.sqrt(self.dot(a, a))

    def largest(self, a: Params) -> Tensor:
        """Take the largest of all shards."""
        found = LOCAL.largest(a)
        calls.all_reduce(self.group, found, dist.ReduceOp.MAX)
        return found

    def holds_finite(self, a: Params) -> bool:
        """Test the entries of all shards."""
        return bool(self.are_finite(a).all())

    def are_finite(self, a: Params) -> Tensor:
        """Test the entries of all shards."""
        found = algebra.are_finite(a).to(torch.int32)
        calls.all_reduce(self.group, found, dist.ReduceOp.MIN)
        return found.bool()

    def differentiable_norm(self, a: Params) -> Tensor:
        """Return the root of the inner product."""
        return self.norm(a)

    def replicate(self, scalar: Tensor) -> Tensor:
        """Return the scalar; its derivative is the sum of the derivatives on all shards."""
        return collectives.use_on_shards(self.group, [scalar])[0]

    def lengths(self, like: Params) -> Sequence[int]:
        """Return the sizes of the whole variables."""
        return self.sizes

    def gather(self, shards: Params) -> list[Tensor]:
        """Gather the stretches, padded to the longest, which is the first."""
        processes = dist.get_world_size(self.group)
        joined = []
        for shard, size in zip(shards, self.sizes, strict=True):
            padded = shard.new_zeros((*shard.shape[:-1], collectives.shard_length(size, processes)))
            padded[..., : shard.shape[-1]] = shard.detach()
            found = [torch.empty_like(padded) for _ in range(processes)]
            calls.all_gather(self.group, found, padded)
            joined.append(torch.cat(found, dim=-1)[..., :size])
        return joined

    def shard(self, tensors: Params) -> list[Tensor]:
        """Take this process's stretches."""
        rank, processes = dist.get_rank(self.group), dist.get_world_size(self.group)
        lengths = [collectives.shard_length(size, processes) for size in self.sizes]
        return [t[..., rank * n : (rank + 1) * n] for t, n in zip(tensors, lengths, strict=True)]


class MeshPlacement(Placement):
    """Variables that are sharded over one group of processes and replicated over another one.

    Args:
        shapes: The shapes of the whole variables.
        shards: The processes that hold one stretch of each flattened variable each; None if this process holds the
            whole variables.
        replicas: The processes that hold the same stretches; None if this process alone holds its stretches.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], shards: dist.ProcessGroup | None, replicas: dist.ProcessGroup | None
    ) -> None:
        self.shapes, self.shards, self.replicas = shapes, shards, replicas
        self.space = LOCAL if shards is None else ShardedSpace([shape.numel() for shape in shapes], shards)

    def to_loss(self, variables: Params) -> Params:
        """Return whole variables; the derivative is the mean over all processes, sharded as the variables are."""
        if self.replicas is not None:
            variables = collectives.use_replicated(self.replicas, variables)
        return variables if self.shards is None else collectives.gather(self.shards, self.shapes, variables)

    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gather vectors like the variables."""
        present = algebra.present(values)
        if self.shards is None or not present:
            return list(values)
        shapes = [shape for shape, v in zip(self.shapes, values, strict=True) if v is not None]
        found = iter(collectives.whole(self.shards, shapes, present))
        return [None if v is None else next(found) for v in values]

    def usable(self, parameters: Params) -> AbstractContextManager[None]:
        """Restore the class of parameters whose values are in shards."""
        return freed.usable(parameters)

    def shard(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Copy this process's stretches of whole vectors."""
        if self.shards is None:
            return list(values)
        return [None if v is None else collectives.shards_of(self.shards, [v])[0] for v in values]
