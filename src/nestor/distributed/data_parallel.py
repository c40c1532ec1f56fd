"""Data parallelism: every process holds whole variables and evaluates losses on its share of every batch."""

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, IterableDataset

from nestor.data.containers import parts, rebuilt
from nestor.distributed import calls
from nestor.distributed.board import Board
from nestor.distributed.collectives import mean
from nestor.distributed.mesh import MeshPlacement
from nestor.distributed.runtime import Runtime
from nestor.errors.options import check_options, typed
from nestor.levels.evaluator import Evaluator

# Seconds that processes wait for each other.
TIMEOUT = 600.0
# Seconds that a process waits for the others at its exit.
PATIENCE = 5.0

# What a loader that loads a part of each batch takes over.
_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "pin_memory_device", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order"),
)


class Distributed(Runtime):
    """A runtime of several processes: opens the process group and divides batches among the processes.

    Args:
        timeout: Seconds that a process waits for the others in a collective; None is ten minutes, or the timeout of the
            process group that the program has initialized.
    """

    @typed
    def __init__(self, *, timeout: float | None = None) -> None:
        self.timeout = timeout
        check_options(self, positive=["timeout"])
        seconds = timedelta(seconds=TIMEOUT if timeout is None else timeout)
        if not dist.is_initialized():
            if "RANK" not in os.environ:
                raise RuntimeError(
                    f"{type(self).__name__} runs in several processes, which torchrun starts: "
                    "torchrun --standalone --nproc-per-node 2 script.py."
                )
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            if accelerator is not None:
                torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
            # Processes may start at different times, whatever the timeout of a collective is.
            begin = timedelta(seconds=max(TIMEOUT, seconds.total_seconds()))
            dist.init_process_group("gloo" if accelerator is None else None, timeout=begin)
            # A process group that the user initialized is not destroyed here.
            atexit.register(_close)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        world = dist.group.WORLD
        assert world is not None
        if timeout is not None:
            world.set_timeout(seconds)
        self.group: dist.ProcessGroup = world
        self.board = Board(world, seconds.total_seconds())

    def compare(self, what: str, description: Mapping[str, Any]) -> None:
        """Compare through the store of the process group."""
        self.board.compare(what, {"the runtime": repr(self), **description})

    def data(self, data: Any) -> Any:
        """Make a map-style loader load only this process's rows of each batch; :meth:`share` cuts other batches."""
        if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset) or data.batch_sampler is None:
            return data
        sampler = _ShareSampler(data.batch_sampler, self.rank, self.size)
        return DataLoader(data.dataset, batch_sampler=sampler, **{name: getattr(data, name) for name in _OPTIONS})

    def share(self, batch: Any) -> Any:
        """Return this process's rows of all that has as many rows as the first tensor of the batch."""
        total = next(_lengths(batch), None)
        return batch if total is None else _cut(batch, total, _rows(total, self.rank, self.size))

    def agree(self, number: int) -> int:
        """Broadcast the number of the first process."""
        box = [number]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set in any process."""
        total = torch.tensor(float(flag))
        calls.all_reduce(self.group, total)
        return bool(total > 0)

    def mean(self, numbers: list[float]) -> list[float]:
        """Average numbers over processes."""
        averaged = torch.tensor(numbers, dtype=torch.float64)
        calls.all_reduce(self.group, averaged)
        return list((averaged / self.size).tolist())

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Average scalars over processes."""
        return mean(self.group, values)

    def replicate(self, evaluator: Evaluator) -> None:
        """Copy the parameters and buffers of the first process to every process."""
        device = torch.accelerator.current_accelerator(check_available=True)
        for level in evaluator.levels.values():
            module = level.problem.module
            if device is not None:
                module.to(device)
            if level.problem.tasks is not None:
                raise ValueError(
                    f"Level {level.name!r} has tasks={level.problem.tasks}, which run in one process: split the tasks "
                    "over processes as batches of fewer tasks instead."
                )
            for tensor in (*module.parameters(), *module.buffers()):
                whole = tensor.detach().contiguous()
                calls.broadcast(self.group, whole)
                tensor.detach().copy_(whole)


class DataParallel(Distributed):
    r"""Evaluate every batch on several processes, each with whole parameters and its share of the rows (``torchrun``).

    .. math:: \text{objective} = \frac1N \sum_{r<N} \text{objective}_r, \qquad
        \text{batch} = \text{batch}_0 \cup \dots \cup \text{batch}_{N-1}

    Batch sizes are global. Every loader yields the batches that it yields in one process, and each process takes its
    rows of them. Gradients, solves and hypergradients are those of the whole batch: for losses that are means over the
    batch, the result does not depend on the number of processes. A batch needs a row for each process. Rows that do not
    divide evenly among the processes are left out. BatchNorm normalizes over the rows of its process, and every process
    draws its own dropout masks. Before the first collective, the processes compare what they are about to run.

    Args:
        timeout: Seconds that a process waits for the others in a collective; None is ten minutes, or the timeout of the
            process group that the program has initialized.

    Raises:
        RuntimeError: If the process was not started by ``torchrun`` and no process group is initialized.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> engine = nestor.Engine(program, runtime=nestor.DataParallel(), seed=0)  # torchrun script.py
        >>> metrics = engine.run(1)
        >>> net.value.tolist()
        [0.5, 0.5]
        >>> torch.distributed.destroy_process_group()
    """

    def place(self, evaluator: Evaluator) -> Evaluator:
        """Copy the first process's parameters to every process, and average the derivatives of losses."""
        self.replicate(evaluator)
        placements = dict.fromkeys(evaluator.levels, MeshPlacement((), None, self.group))
        levels = {
            name: replace(level, loss=replace(level.loss, placements=placements))
            for name, level in evaluator.levels.items()
        }
        return evaluator.with_levels(levels, self.average)


def _close() -> None:
    if dist.is_initialized():
        world = dist.group.WORLD
        assert world is not None
        # A process whose connections are closed by another one while its own threads run may abort.
        with suppress(RuntimeError):  # the store may be gone
            Board(world, 0).all_arrive(PATIENCE)
        dist.destroy_process_group()


@dataclass(frozen=True)
class _ShareSampler:
    """Yields this process's rows of each batch of indices."""

    sampler: Any  # a torch.utils.data.BatchSampler, or any iterable of lists of indices with a length
    rank: int
    size: int

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            yield list(batch)[_rows(len(batch), self.rank, self.size)]

    def __len__(self) -> int:
        return len(self.sampler)


def _rows(total: int, rank: int, size: int) -> slice:
    if total < size:
        raise ValueError(
            f"A batch of {total} rows cannot be shared by {size} processes. Take larger batches (batch sizes are "
            "global), or drop_last=True."
        )
    each = total // size
    return slice(rank * each, (rank + 1) * each)


def _lengths(batch: Any) -> Iterator[int]:
    """Yield the number of rows of each tensor and packed sequence of a nested batch, in order."""
    if isinstance(batch, PackedSequence):
        yield int(batch.batch_sizes[0])
    elif isinstance(batch, Tensor):
        if batch.dim():
            yield len(batch)
    else:
        for part in parts(batch):
            yield from _lengths(part)


def _cut(batch: Any, total: int, rows: slice) -> Any:
    """Take rows of what has ``total`` of them, in nested containers of the same types."""
    if isinstance(batch, PackedSequence):
        padded, lengths = pad_packed_sequence(batch, batch_first=True)
        if len(lengths) != total:
            return batch
        return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=False)
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() and batch.shape[0] == total else batch
    if isinstance(batch, list) and len(batch) == total and not any(isinstance(value, Tensor) for value in batch):
        return batch[rows]
    return rebuilt(batch, lambda part: _cut(part, total, rows))
