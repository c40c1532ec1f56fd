"""Fully sharded data parallelism: processes also divide variables, gradients and optimizer states."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import LBFGS, Adafactor, Muon, SparseAdam

from nestor.distributed.collectives import shards_of
from nestor.distributed.data_parallel import Distributed
from nestor.distributed.freed import free, restore
from nestor.distributed.mesh import MeshPlacement
from nestor.errors import UnsupportedError
from nestor.errors.options import typed
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.optim.functional_step import is_elementwise
from nestor.optim.stepper import is_of_torch
from nestor.vectors import algebra

# Seconds after an error in which the other processes must meet one, for the modules to become whole.
PATIENCE = 5.0


class FullySharded(Distributed):
    """Shard variables, gradients, optimizer states and solver vectors over processes (ZeRO-3), under ``torchrun``.

    During a run, each process holds one stretch of every flattened variable. The user's optimizers step the stretches,
    with their own groups, options and state. Outside a run, the modules hold the whole variables. Each evaluation of a
    loss gathers the whole variables of the levels that it reads, one level at a time; they are freed with the graph of
    the loss. The peak memory is that of the shards plus the whole variables of the levels that one loss reads. Batches
    and the global objective are those of :class:`DataParallel`.

    Args:
        mesh: ``(replicas, shards)``: shard within groups of ``shards`` processes and replicate across ``replicas``
            groups (HSDP); None shards over all processes.
        timeout: Seconds that a process waits for the others; see :class:`DataParallel`.

    Raises:
        RuntimeError: If the process was not started by ``torchrun`` and no process group is initialized.
        ValueError: If the mesh does not have as many places as there are processes.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> engine = nestor.Engine(program, runtime=nestor.FullySharded(), seed=0)  # torchrun script.py
        >>> metrics = engine.run(1)
        >>> net.value.tolist()
        [0.5, 0.5]
        >>> torch.distributed.destroy_process_group()
    """

    holds_variables = True

    @typed
    def __init__(self, *, mesh: tuple[int, int] | None = None, timeout: float | None = None) -> None:
        super().__init__(timeout=timeout)
        self.mesh = mesh
        replicas, shards = mesh if mesh is not None else (1, self.size)
        if replicas * shards != self.size or replicas < 1:
            raise ValueError(f"FullySharded(mesh={mesh}) has {replicas * shards} places for {self.size} processes.")
        self.replicas: dist.ProcessGroup | None = None
        self.shards = self.group
        if replicas > 1:
            self.compare("FullySharded(mesh=...)", {})
            limit = timedelta(seconds=self.board.timeout)
            # torch requires that every process takes part in the creation of every group.
            rows = [dist.new_group(list(range(row * shards, (row + 1) * shards)), limit) for row in range(replicas)]
            columns = [dist.new_group(list(range(column, self.size, shards)), limit) for column in range(shards)]
            row, column = rows[self.rank // shards], columns[self.rank % shards]
            assert isinstance(row, dist.ProcessGroup)
            assert isinstance(column, dist.ProcessGroup)
            self.shards, self.replicas = row, column
        self._owned: list[tuple[Level, MeshPlacement, tuple[nn.Parameter, ...]]] = []
        self._released = False

    def __repr__(self) -> str:
        return f"FullySharded({'' if self.mesh is None else f'mesh={self.mesh}'})"

    def place(self, evaluator: Evaluator) -> Evaluator:
        """Shard the first process's variables, and replace them by their shards in the optimizers."""
        self.replicate(evaluator)
        for level in evaluator.levels.values():
            _check(level)
        # All losses share these mappings, which are complete after the loop.
        shards: dict[str, tuple[nn.Parameter, ...]] = {}
        placements: dict[str, MeshPlacement] = {}
        levels = {}
        for name, level in evaluator.levels.items():
            shards[name] = tuple(nn.Parameter(piece) for piece in shards_of(self.shards, level.parameters))
            placements[name] = MeshPlacement([p.shape for p in level.parameters], self.shards, self.replicas)
            self._owned.append((level, placements[name], shards[name]))
            _replace_in_optimizer(level, shards[name])
            levels[name] = replace(
                level,
                parameters=shards[name],
                loss=replace(level.loss, variables=shards, placements=placements),
                stepping=replace(level.stepping, parameters=shards[name], space=placements[name].space),
            )
        return evaluator.with_levels(levels, self.average)

    def begin(self) -> None:
        """Copy the variables from the modules to the shards, and free the memory of the modules' parameters."""
        if not self._released:  # else an error ended the last run, and the shards hold the variables
            self._cut()
            self._release()

    @torch.no_grad()
    def end(self) -> None:
        """Gather the shards into the modules' parameters. All processes must call this method."""
        if not self._released:
            return  # the modules hold the variables
        for level, placement, pieces in self._owned:
            for parameter, value in zip(level.parameters, placement.gather(pieces), strict=True):
                assert value is not None
                restore(parameter, value)
        self._released = False

    def end_after(self, error: BaseException) -> None:
        """Gather the shards, if all processes have met an error within some seconds."""
        if not self._released:
            return
        if self.board.all_arrive(PATIENCE):
            self.end()
        else:
            error.add_note(
                "The variables are in the shards of the processes, and the modules hold none: not all processes have "
                "ended the run. engine.runtime.end() gathers them if all processes call it; or load a checkpoint."
            )

    @contextmanager
    def as_in_a_run(self) -> Iterator[None]:
        """Take the variables from the modules, and write them back afterwards, unless the run has taken them already.

        All processes must enter the context.
        """
        released = self._released
        self.begin()
        yield
        if not released:
            self.end()

    @contextmanager
    def whole_modules(self) -> Iterator[None]:
        """Gather the shards into the modules, and copy the modules' parameters back to the shards afterwards.

        All processes must enter the context.
        """
        released = self._released
        if released:
            self.end()
        yield
        self._cut()
        if released:
            self._release()

    @torch.no_grad()
    def _cut(self) -> None:
        for level, _, pieces in self._owned:
            algebra.copy_(pieces, shards_of(self.shards, level.parameters))

    def _release(self) -> None:
        """Free the memory of the modules' parameters, which keep their shapes; losses use gathered tensors instead."""
        for level, _, _ in self._owned:
            free(level.name, level.parameters)
        self._released = True


def _check(level: Level) -> None:
    optimizer = level.problem.optimizer
    if isinstance(optimizer, LBFGS | Adafactor | Muon | SparseAdam):
        raise ValueError(
            f"Level {level.name!r}: {type(optimizer).__name__} steps whole matrices, and FullySharded steps stretches "
            "of flattened ones. Take an elementwise optimizer (SGD, Adam, AdamW), or DataParallel()."
        )
    if optimizer is not None and not is_of_torch(optimizer) and not is_elementwise(optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} does not step every entry of a parameter on its own, and FullySharded steps "
            "stretches of flattened parameters. Take an elementwise optimizer (SGD, Adam, AdamW), or DataParallel().",
            level=level.name,
        )
    if optimizer is not None and optimizer.state:
        raise ValueError(
            f"Level {level.name!r}: its optimizer has a state already. Shard before the first step: build the engine "
            "with runtime=FullySharded() and load a checkpoint afterwards."
        )
    if level.uppers and not level.response.works_on_shards:
        raise UnsupportedError(
            f"{level.response.describe()} moves single upper variables, of which each process holds a part only. Use "
            "Unrolled(), or runtime=nestor.DataParallel().",
            level=level.name,
        )
    if level.stepping.learned:
        raise ValueError(
            f"Level {level.name!r}: learned hyperparameters ({[key for _, key in level.stepping.learned]}) cannot be "
            "sharded. Use DataParallel()."
        )
    if level.problem.update is not None:
        raise ValueError(
            f"Level {level.name!r} has an update rule of its own, which may need whole parameters. Use DataParallel()."
        )


def _replace_in_optimizer(level: Level, shards: tuple[nn.Parameter, ...]) -> None:
    """Replace the level's parameters by their shards in the groups of its optimizer."""
    optimizer = level.problem.optimizer
    found = {id(parameter): shard for parameter, shard in zip(level.parameters, shards, strict=True)}
    for group in optimizer.param_groups if optimizer is not None else ():
        group["params"] = [found.get(id(parameter), parameter) for parameter in group["params"]]
