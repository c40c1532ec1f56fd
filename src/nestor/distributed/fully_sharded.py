"""Several processes that share the parameters, gradients and optimizer states too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Muon, SparseAdam

from nestor.distributed.collectives import Gather, Replica, gather, shards_of
from nestor.distributed.data_parallel import Distributed
from nestor.distributed.sharded_space import ShardedSpace
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.placement import Placement
from nestor.vectors import Params


class Sharded(Placement):
    """Every process holds a stretch of each flattened variable; a loss reads gathered ones."""

    def __init__(
        self, shapes: Sequence[torch.Size], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> None:
        self.shapes = shapes
        self.group = group
        self.replicas = replicas
        self.space = ShardedSpace([shape.numel() for shape in shapes], group)

    def to_loss(self, variables: Params) -> Params:
        """Gather; the derivative scatters the mean over all processes."""
        if self.replicas is not None:
            variables = Replica.apply(self.replicas, *variables)  # type: ignore[no-untyped-call]
        used: tuple[Tensor, ...] = Gather.apply(self.group, self.shapes, *variables)  # type: ignore[no-untyped-call]
        return used

    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gather vectors like the variables."""
        present = [v for v in values if v is not None]
        shapes = [shape for shape, v in zip(self.shapes, values, strict=True) if v is not None]
        found = iter(gather(self.group, shapes, present) if present else [])
        return [None if v is None else next(found) for v in values]

    def shard(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Cut."""
        return [None if v is None else shards_of(self.group, [v])[0] for v in values]


class FullySharded(Distributed):
    """Shard variables, gradients, optimizer states and solver vectors over processes (ZeRO-3), under ``torchrun``.

    Each process holds a stretch of every variable during a run, and the modules hold the whole ones again after it; the
    user's optimizers are pointed at them and keep their groups,
    options and state. A loss reads whole variables, gathered for each evaluation one level at a time and let go of when
    its graph is: the peak is the shards plus the whole variables of the levels that one loss reads. Batches and the
    global objective are those of :class:`DataParallel`.

    Args:
        mesh: ``(replicas, shards)``: shard within groups of ``shards`` processes and replicate across ``replicas``
            groups (HSDP); None shards over all processes.

    Raises:
        RuntimeError: If the process was not started by ``torchrun`` and no process group is initialized.
        ValueError: If the mesh does not have as many places as there are processes.
    """

    holds_variables = True

    def __init__(self, *, mesh: tuple[int, int] | None = None) -> None:
        super().__init__()
        replicas, shards = mesh if mesh is not None else (1, self.size)
        if replicas * shards != self.size or replicas < 1:
            raise ValueError(f"FullySharded(mesh={mesh}) has {replicas * shards} places for {self.size} processes.")
        self.replicas: dist.ProcessGroup | None = None
        self.shards = self.group
        if replicas > 1:
            # Every process takes part in making every group.
            rows = [dist.new_group(list(range(row * shards, (row + 1) * shards))) for row in range(replicas)]
            columns = [dist.new_group(list(range(column, self.size, shards))) for column in range(shards)]
            row, column = rows[self.rank // shards], columns[self.rank % shards]
            assert isinstance(row, dist.ProcessGroup)
            assert isinstance(column, dist.ProcessGroup)
            self.shards, self.replicas = row, column
        self._owned: list[tuple[Level, Sharded, tuple[nn.Parameter, ...]]] = []
        self._released = False

    def place(self, evaluator: Evaluator) -> Evaluator:
        """Cut the variables, point the optimizers at the stretches, and let go of the whole ones."""
        self.replicate(evaluator)
        shards: dict[str, tuple[nn.Parameter, ...]] = {}
        placements: dict[str, Placement] = {}
        for name, level in evaluator.levels.items():
            _check(level)
            pieces = shards_of(self.shards, level.parameters)
            shards[name] = tuple(nn.Parameter(piece) for piece in pieces)
            placement = Sharded([p.shape for p in level.parameters], self.shards, self.replicas)
            placements[name] = placement
            self._owned.append((level, placement, shards[name]))
        levels = {}
        for name, level in evaluator.levels.items():
            _point(level, shards[name])
            levels[name] = replace(
                level,
                parameters=shards[name],
                loss=replace(level.loss, variables=shards, placements=placements),
                stepping=replace(level.stepping, parameters=shards[name], space=placements[name].space),
            )
        return evaluator.with_levels(levels, self.average)

    def begin(self) -> None:
        """Cut the variables that the modules hold, and let go of the whole ones."""
        self._cut()
        self._release()

    def end(self) -> None:
        """Gather the variables into the modules."""
        for level, placement, pieces in self._owned:
            for parameter, value in zip(level.parameters, placement.gather(list(pieces)), strict=True):
                assert value is not None
                parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
                with torch.no_grad():
                    parameter.copy_(value)
        self._released = False

    @contextmanager
    def whole_modules(self) -> Iterator[None]:
        """Gather, and cut again: what was loaded is taken over."""
        released = self._released
        if released:
            self.end()
        yield
        self._cut()
        if released:
            self._release()

    def _cut(self) -> None:
        for level, _, pieces in self._owned:
            with torch.no_grad():
                for piece, value in zip(pieces, shards_of(self.shards, level.parameters), strict=True):
                    piece.copy_(value)

    def _release(self) -> None:
        """Free the modules' own memory; shapes stay. Losses read gathered tensors in its place."""
        for level, _, _ in self._owned:
            for parameter in level.parameters:
                parameter.untyped_storage().resize_(0)
        self._released = True


def _check(level: Level) -> None:
    if isinstance(level.problem.optimizer, LBFGS | Adafactor | Muon | SparseAdam):
        raise ValueError(
            f"Level {level.name!r}: {type(level.problem.optimizer).__name__} looks at whole matrices, and FullySharded "
            "steps stretches of flattened ones. Take an elementwise optimizer (SGD, Adam, AdamW), or DataParallel()."
        )
    if level.stepping.learned:
        raise ValueError(
            f"Level {level.name!r}: learned hyperparameters ({[key for _, key in level.stepping.learned]}) cannot be "
            "sharded. Use DataParallel()."
        )
    if level.problem.update is not None:
        raise ValueError(
            f"Level {level.name!r} has an update rule of its own, which may look at whole parameters. Use "
            "DataParallel()."
        )


def _point(level: Level, shards: tuple[nn.Parameter, ...]) -> None:
    """Put the stretches into the optimizer's groups, and what it keeps with them."""
    optimizer = level.problem.optimizer
    if optimizer is None:
        return
    if optimizer.state:
        raise ValueError(
            f"Level {level.name!r}: its optimizer has a state already. Shard before the first step: build the engine "
            "with runtime=FullySharded() and load a checkpoint afterwards."
        )
    place = {id(parameter): shard for parameter, shard in zip(level.parameters, shards, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [place.get(id(parameter), parameter) for parameter in group["params"]]
