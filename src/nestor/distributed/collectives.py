"""Conjugate collectives: linear maps across processes, differentiable to any order, in reverse and in forward mode.

A tensor is *local* to a process, *replicated* (equal on all processes), or a *shard* (a stretch of a flattened whole
tensor). The global objective is the mean over processes of the local objectives. The transpose of every map below is
taken with respect to it, and is itself one of the maps:

=========================  ==================================================  =========================
map                        value                                               transpose
=========================  ==================================================  =========================
:func:`use_replicated`     replicated to local: the tensors themselves         :func:`average`
:func:`average`            local to replicated: their mean                     :func:`use_replicated`
:func:`gather`             shards to local: the whole tensors                  :func:`average_and_shard`
:func:`average_and_shard`  local to shards: the shards of their mean           :func:`gather`
:func:`sum_shards`         terms of a sum, one per process, to local: the sum  :func:`average_terms`
:func:`average_terms`      local scalars to terms: their mean                  :func:`sum_shards`
:func:`use_on_shards`      a replicated scalar, for use on shards: itself      :func:`sum_shards`
=========================  ==================================================  =========================

Every map takes a list of tensors. It communicates one flat buffer for each dtype; :func:`sum_shards` communicates each
scalar.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from nestor.autodiff.grad import dense
from nestor.distributed import calls
from nestor.vectors import algebra

Group: TypeAlias = dist.ProcessGroup
Tensors: TypeAlias = Sequence[Tensor]
Grads: TypeAlias = Sequence[Tensor | None]


def use_replicated(group: Group, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return replicated tensors for use in a local objective; the transpose averages."""
    return _linear(_views, partial(use_replicated, group), partial(_average_present, group, tensors), tensors)


def average(group: Group, tensors: Tensors) -> tuple[Tensor, ...]:
    """Average local tensors over processes; the transpose uses the cotangents locally."""
    return _linear(partial(mean, group), partial(average, group), partial(use_replicated, group), tensors, dense=True)


def gather(group: Group, shapes: Sequence[torch.Size], shards: Tensors) -> tuple[Tensor, ...]:
    """Gather the shards of all processes to whole tensors; the transpose shards the average."""
    again = partial(gather, group, shapes)
    return _linear(partial(whole, group, shapes), again, partial(_shard_present, group, shapes, shards), shards)


def average_and_shard(group: Group, shapes: Sequence[torch.Size], tensors: Tensors) -> tuple[Tensor, ...]:
    """Average local whole tensors and take this process's shards; the transpose gathers.

    Tensors beyond those that have ``shapes`` are averaged too. They are returned whole and have no derivative.
    """
    count = len(shapes)

    def value(tensors: Tensors) -> list[Tensor]:
        averaged = mean(group, tensors)
        return [*shards_of(group, averaged[:count]), *averaged[count:]]

    def transpose(grads: Tensors) -> Grads:
        return [*gather(group, shapes, grads[:count]), *[None] * (len(grads) - count)]

    return _linear(value, partial(average_and_shard, group, shapes), transpose, tensors, dense=True)


def sum_shards(group: Group, terms: Tensors) -> tuple[Tensor, ...]:
    """Add up scalars to which every process contributes a term; the transpose averages."""
    return _linear(partial(_sums, group), partial(sum_shards, group), partial(average_terms, group), terms, dense=True)


def average_terms(group: Group, scalars: Tensors) -> tuple[Tensor, ...]:
    """Average local scalars over processes, as the transpose of :func:`sum_shards`, which is its transpose too."""
    again = partial(average_terms, group)
    return _linear(partial(mean, group), again, partial(sum_shards, group), scalars, dense=True)


def use_on_shards(group: Group, scalars: Tensors) -> tuple[Tensor, ...]:
    """Return replicated scalars for use on shards; the transpose adds up the cotangents of all shards."""
    return _linear(_views, partial(use_on_shards, group), partial(sum_shards, group), scalars, dense=True)


class _Linear(torch.autograd.Function):
    """A linear map, given by its value on plain tensors, itself as a differentiable function, and its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Callable[[Tensors], Tensors],
        again: Callable[[Tensors], Tensors],
        transpose: Callable[[Grads], Grads],
        dense: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.transpose = again, transpose
        ctx.like = None if dense else tensors
        ctx.set_materialize_grads(dense)
        return tuple(value(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *ctx.transpose(grads))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, ___: None, ____: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(ctx.again(tangents if ctx.like is None else algebra.zeros_for_none(tangents, ctx.like)))


def _linear(value: Any, again: Any, transpose: Any, tensors: Tensors, *, dense: bool = False) -> tuple[Tensor, ...]:
    """Apply a linear map. Its transpose receives zeros for missing cotangents if ``dense``, else None."""
    results: tuple[Tensor, ...] = _Linear.apply(value, again, transpose, dense, *tensors)  # type: ignore[no-untyped-call]
    return results


def _views(tensors: Tensors) -> list[Tensor]:
    return [t.view_as(t) for t in tensors]


def _sums(group: Group, terms: Tensors) -> list[Tensor]:
    sums = [term.clone() for term in terms]
    for total in sums:
        calls.all_reduce(group, total)
    return sums


def _average_present(group: Group, like: Tensors, grads: Grads) -> Grads:
    """Average gradients, where None is zero; the result is None where no process has one.

    A parameter that no process uses gets no gradient, so that weight decay does not change it, as in one process.
    """
    found = algebra.zeros_for_none(dense(grads), like)
    return _present(grads, average(group, [*found, _flags(grads, like[0])]))


def _shard_present(group: Group, shapes: Sequence[torch.Size], like: Tensors, grads: Grads) -> Grads:
    """Average whole gradients and shard them; None as in :func:`_average_present`."""
    found = [like[0].new_zeros(s) if g is None else g for g, s in zip(dense(grads), shapes, strict=True)]
    return _present(grads, average_and_shard(group, shapes, [*found, _flags(grads, like[0])]))


def _flags(grads: Grads, like: Tensor) -> Tensor:
    """Return one entry a gradient, 1 if this process has it, which is averaged with the gradients."""
    return torch.tensor([float(g is not None) for g in grads], device=like.device, dtype=like.dtype)


def _present(grads: Grads, averaged: Tensors) -> Grads:
    """Replace by None what no process has; the flags are the last of the averaged tensors."""
    if all(g is not None for g in grads):
        return averaged[:-1]
    # The flags are read only if a gradient is missing: reading waits for the device.
    flags = averaged[-1].tolist()
    return [value if flag > 0 else None for value, flag in zip(averaged, flags, strict=False)]


def mean(group: Group, tensors: Tensors) -> list[Tensor]:
    """Average tensors over processes, without a derivative: one reduction for each dtype."""
    size = dist.get_world_size(group)
    results: list[Tensor] = list(tensors)
    for indices in _by_dtype(tensors):
        flat = torch.cat([tensors[index].detach().reshape(-1) for index in indices])
        calls.all_reduce(group, flat)
        pieces = torch.split(flat / size, [tensors[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            results[index] = piece.view(tensors[index].shape)
    return results


def whole(group: Group, shapes: Sequence[torch.Size], shards: Tensors) -> list[Tensor]:
    """Join the shards of all processes, without a derivative: one collective for each dtype."""
    size = dist.get_world_size(group)
    results: list[Tensor] = list(shards)
    for indices in _by_dtype(shards):
        lengths = [shard_length(shapes[index].numel(), size) for index in indices]
        # Shards are padded to the length of the first process's shard.
        flat = torch.zeros(sum(lengths), dtype=shards[indices[0]].dtype, device=shards[indices[0]].device)
        for part, index in zip(torch.split(flat, lengths), indices, strict=True):
            part[: shards[index].numel()] = shards[index].detach()
        gathered = flat.new_empty(size, flat.numel())
        calls.all_gather(group, gathered.unbind(), flat)
        for part, index in zip(torch.split(gathered, lengths, dim=1), indices, strict=True):
            # A single entry would keep the stride of the buffer, and could not be viewed as bytes.
            found = part.reshape(-1)[: shapes[index].numel()].view(shapes[index])
            results[index] = found.clone(memory_format=torch.contiguous_format)
    return results


def shards_of(group: Group, tensors: Tensors) -> list[Tensor]:
    """Copy this process's shards of whole tensors, without a derivative."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    lengths = [shard_length(t.numel(), size) for t in tensors]
    return [t.detach().reshape(-1)[rank * n : (rank + 1) * n].clone() for t, n in zip(tensors, lengths, strict=True)]


def shard_length(count: int, size: int) -> int:
    """Entries that the first of ``size`` processes holds of ``count``; the last ones may hold fewer, or none."""
    return -(-count // size)


def _by_dtype(tensors: Tensors) -> list[list[int]]:
    """Group the indices of tensors by dtype, in order of first appearance."""
    dtypes = [t.dtype for t in tensors]
    return [[index for index, found in enumerate(dtypes) if found == dtype] for dtype in dict.fromkeys(dtypes)]
