"""Conjugate collectives: each the derivative of another, to any order, in the cotangents too, and in forward mode.

The global objective is the mean over processes of the local ones, and a replicated scalar is the mean of itself. All of
them take a list of tensors and use one flat buffer for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Shapes: TypeAlias = Sequence[torch.Size]


class Replica(torch.autograd.Function):
    """Replicated parameters, for local use; the derivative averages."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        ctx.like = tensors
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *mean_of_present(ctx.group, grads, ctx.like))

    @staticmethod
    def jvp(ctx: Any, group: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tangents)


class Mean(torch.autograd.Function):
    """Local tensors to their mean, on every process; the derivative is local use."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(mean(group, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *Replica.apply(ctx.group, *grads))  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, group: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(Mean.apply(ctx.group, *tangents))  # type: ignore[no-untyped-call]


class Gather(torch.autograd.Function):
    """This process's shards to whole tensors, on every process; the derivative scatters the mean."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, shapes: Shapes, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, shapes
        ctx.set_materialize_grads(False)
        ctx.like = shards
        return tuple(gather(group, shapes, shards))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        flags = _flags(grads, ctx.like[0])
        dense = [ctx.like[0].new_zeros(s) if g is None else g for g, s in zip(grads, ctx.shapes, strict=True)]
        found = ReduceScatterMean.apply(ctx.group, ctx.shapes, *dense, flags)  # type: ignore[no-untyped-call]
        return (None, None, *_present(grads, found))

    @staticmethod
    def jvp(ctx: Any, group: None, shapes: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        dense = [torch.zeros_like(s) if t is None else t for t, s in zip(tangents, ctx.like, strict=True)]
        return tuple(Gather.apply(ctx.group, ctx.shapes, *dense))  # type: ignore[no-untyped-call]


class ReduceScatterMean(torch.autograd.Function):
    """Whole local tensors to this process's shards of their mean; the derivative gathers.

    Tensors beyond those that have shapes come back whole, without a derivative.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, shapes: Shapes, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, shapes
        averaged = mean(group, tensors)
        rest = averaged[len(shapes) :]
        ctx.mark_non_differentiable(*rest)
        return (*shards_of(group, averaged[: len(shapes)]), *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.shapes)
        gathered = Gather.apply(ctx.group, ctx.shapes, *grads[:count])  # type: ignore[no-untyped-call]
        return (None, None, *gathered, *[None] * (len(grads) - count))

    @staticmethod
    def jvp(ctx: Any, group: None, shapes: None, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.shapes)
        pushed = ReduceScatterMean.apply(ctx.group, ctx.shapes, *tangents[:count])  # type: ignore[no-untyped-call]
        return (*pushed, *[None] * (len(tangents) - count))


class SumShards(torch.autograd.Function):
    """A scalar's contributions of the shards to their sum, on every process; the derivative averages."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, value: Tensor) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (averaged,) = Mean.apply(ctx.group, grad)  # type: ignore[no-untyped-call]
        return None, averaged

    @staticmethod
    def jvp(ctx: Any, group: None, tangent: Tensor) -> Tensor:
        total: Tensor = SumShards.apply(ctx.group, tangent)  # type: ignore[no-untyped-call]
        return total


class ReplicatedScalar(torch.autograd.Function):
    """A scalar that all processes know, for use on their shards; the derivative adds up over them."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, value: Tensor) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, SumShards.apply(ctx.group, grad)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, group: None, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def mean(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors over processes: one reduction for each dtype."""
    size = dist.get_world_size(group)
    results: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [index for index, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[index].detach().reshape(-1) for index in places])
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat / size, [tensors[index].numel() for index in places])
        for index, piece in zip(places, pieces, strict=True):
            results[index] = piece.view(tensors[index].shape)
    return results


def mean_of_present(
    group: dist.ProcessGroup, grads: Sequence[Tensor | None], like: Sequence[Tensor]
) -> list[Tensor | None]:
    """Average gradients, where None stands for zero; None where no process has one.

    A parameter that no process uses keeps no gradient, so that weight decay leaves it alone, as in one process.
    """
    dense = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]
    averaged = Mean.apply(group, *dense, _flags(grads, like[0]))  # type: ignore[no-untyped-call]
    return _present(grads, averaged)


def _flags(grads: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.tensor([float(g is not None) for g in grads], device=like.device, dtype=like.dtype)


def _present(grads: Sequence[Tensor | None], averaged: Sequence[Tensor]) -> list[Tensor | None]:
    """Drop what no process has; the flags are the last of the averaged tensors."""
    if all(g is not None for g in grads):
        return list(averaged[:-1])
    # Read only where something is missing: this waits for the device.
    known = averaged[-1].tolist()
    return [value if flag > 0 else None for value, flag in zip(averaged, known, strict=False)]


def gather(group: dist.ProcessGroup, shapes: Sequence[torch.Size], shards: Sequence[Tensor]) -> list[Tensor]:
    """Put the shards of all processes together: one collective for each dtype."""
    size = dist.get_world_size(group)
    results: list[Tensor] = list(shards)
    for dtype in dict.fromkeys(t.dtype for t in shards):
        places = [index for index, t in enumerate(shards) if t.dtype == dtype]
        lengths = [shard_length(shapes[index].numel(), size) for index in places]
        flat = torch.zeros(sum(lengths), dtype=dtype, device=shards[places[0]].device)
        start = 0
        for index, length in zip(places, lengths, strict=True):
            flat[start : start + shards[index].numel()] = shards[index].detach()
            start += length
        whole = flat.new_empty(size, flat.numel())
        dist.all_gather(list(whole.unbind()), flat, group=group)
        start = 0
        for index, length in zip(places, lengths, strict=True):
            count = shapes[index].numel()
            results[index] = whole[:, start : start + length].reshape(-1)[:count].view(shapes[index]).clone()
            start += length
    return results


def shards_of(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Take this process's shards of whole tensors."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found = []
    for t in tensors:
        length = shard_length(t.numel(), size)
        found.append(t.detach().reshape(-1)[rank * length : (rank + 1) * length].clone())
    return found


def shard_length(count: int, size: int) -> int:
    """Elements that the first of ``size`` processes holds of ``count``; the last ones may hold fewer, or none."""
    return -(-count // size)
