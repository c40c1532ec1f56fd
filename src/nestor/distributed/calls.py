"""Collective calls of torch; one that fails says which it was, and which process did not take part."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nestor.distributed.board import Board
from nestor.errors import ProcessError


def all_reduce(group: dist.ProcessGroup, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce a tensor over processes, in place."""
    _call("all_reduce", group, tensor, lambda: dist.all_reduce(tensor, op, group=group))


def all_gather(group: dist.ProcessGroup, found: Sequence[Tensor], tensor: Tensor) -> None:
    """Gather the tensors of all processes into ``found``."""
    _call("all_gather", group, tensor, lambda: dist.all_gather(list(found), tensor, group=group))


def broadcast(group: dist.ProcessGroup, tensor: Tensor) -> None:
    """Copy the tensor of the first process into those of all."""
    _call("broadcast", group, tensor, lambda: dist.broadcast(tensor, group=group, group_src=0))


def _call(name: str, group: dist.ProcessGroup, tensor: Tensor, collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise _explained(name, group, tensor, error) from error


def _explained(name: str, group: dist.ProcessGroup, tensor: Tensor, error: RuntimeError) -> ProcessError:
    text = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    try:
        lost = Board(group, 0).missing()
    except RuntimeError:  # the process that holds the store is gone
        lost = []
    ranks = [dist.get_global_rank(group, rank) for rank in lost]
    who = f"Process {', '.join(map(str, ranks))} did not take part" if ranks else "A process did not take part"
    return ProcessError(
        f"{name} of {tuple(tensor.shape)} {tensor.dtype} failed in process {dist.get_rank()} of {dist.get_world_size()}"
        f": {text}. {who}: it hangs, has ended, or evaluates something else. If it is only slow, give the runtime a "
        "longer timeout=seconds."
    )
