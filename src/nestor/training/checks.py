"""Checks that an engine can run a program: optimizers, data, validation."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch.distributed as dist
from torch.optim import LBFGS
from torch.utils.data import DataLoader, Sampler

from nestor.data.reachable import reachable
from nestor.data.zipped import loaders_of
from nestor.distributed import Runtime
from nestor.errors import NestorWarning, UnsupportedError
from nestor.explain.nested_cost import warn_of_nested_cost
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.signatures import level_arguments, location, read_parameters
from nestor.training.callback import Callback


def check_program(evaluator: Evaluator, runtime: Runtime) -> None:
    """Check that the engine can step every level, and warn if a step is very costly.

    Raises:
        ValueError: If a level lacks an optimizer or data, shares an optimizer with another level, or its loader splits
            the data among processes and the runtime does too, or has a batch of fewer rows than there are processes.
    """
    _check_samplers(evaluator.levels, runtime)
    _check_batches(evaluator.levels, runtime)
    owner: dict[int, str] = {}
    for name, level in evaluator.levels.items():
        problem = level.problem
        if problem.optimizer is None and problem.update is None:
            raise ValueError(
                f"Level {name!r} has no optimizer, so the engine cannot step it: "
                "Problem(..., optimizer=torch.optim.Adam(module.parameters()))."
            )
        if isinstance(problem.optimizer, LBFGS):
            raise ValueError(f"Level {name!r}: LBFGS calls the loss itself and cannot be stepped; use SGD or Adam.")
        if problem.optimizer is not None and owner.setdefault(id(problem.optimizer), name) != name:
            raise ValueError(
                f"Levels {owner[id(problem.optimizer)]!r} and {name!r} share one optimizer; give each its own."
            )
        if problem.scheduler is not None and problem.scheduler.optimizer is not problem.optimizer:
            raise ValueError(f"Level {name!r}: its scheduler changes another optimizer than its own.")
        if level.loss.takes_batch and problem.data is None:
            raise ValueError(
                f"Level {name!r}, loss {level.loss.where}: its loss takes a batch, but the level has no data: "
                "Problem(..., data=loader)."
            )
    warn_of_nested_cost(evaluator)


def _check_samplers(levels: Mapping[str, Level], runtime: Runtime) -> None:
    """Check that no loader splits the data among processes if the runtime splits each batch.

    Raises:
        UnsupportedError: If a loader does: every process would see a part of its part, and some rows would not be seen.
    """
    for name, level in levels.items():
        for sampler in _samplers(level.problem.data):
            if _parts(sampler) < 2:
                continue
            if runtime.size > 1:
                raise UnsupportedError(
                    f"its data uses {type(sampler).__name__}, which gives every process a part of the rows, and "
                    f"{type(runtime).__name__}() gives every process a part of each batch: most rows would never be "
                    "seen. Use a plain sampler, which is the same in every process: DataLoader(dataset, batch_size, "
                    "shuffle=True). Batch sizes are those of all processes together.",
                    level=name,
                    where=level.loss.where,
                )
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                warnings.warn(
                    f"Level {name!r}: its data uses {type(sampler).__name__}, but {type(runtime).__name__}() trains "
                    "separate variables in every process, each on a part of the rows. Write Engine(program, "
                    "runtime=nestor.DataParallel()) and a plain sampler.",
                    NestorWarning,
                    stacklevel=5,
                )


def _check_batches(levels: Mapping[str, Level], runtime: Runtime) -> None:
    """Check the sizes of the batches of loaders, as far as these tell them, before the first collective of a run.

    Raises:
        ValueError: If a batch, such as the last one of an epoch, has fewer rows than there are processes.
    """
    for name, level in levels.items():
        for loader in loaders_of(level.problem.data) or (level.problem.data,):
            if not isinstance(loader, DataLoader) or not loader.batch_size or not isinstance(loader.sampler, Sized):
                continue
            total, batch = len(loader.sampler), loader.batch_size
            for rows in (min(total, batch), 0 if loader.drop_last else total % batch):
                if 0 < rows < runtime.size:
                    raise ValueError(
                        f"Level {name!r}: {total} rows in batches of {batch} leave a batch of {rows}, which "
                        f"{runtime.size} processes cannot share. Batch sizes are those of all processes together: take "
                        "larger batches, or drop the last one with drop_last=True."
                    )


def _samplers(data: Any) -> Iterator[Sampler[Any]]:
    """Yield the samplers of loaders, those inside them, and those of loaders inside other iterables."""
    # The class of a loader in a package may be no DataLoader (Lightning Fabric's wraps one).
    return (part for part in reachable(data, closed=(Iterator,)) if isinstance(part, Sampler))


def _parts(sampler: Sampler[Any]) -> int:
    """Return among how many processes a sampler divides the rows, by the names that torch and accelerate use."""
    kept = vars(sampler)
    return int(kept.get("num_replicas") or kept.get("num_processes") or 1)


def validation_arguments(validate: Callable[..., Any] | None, levels: Mapping[str, Level]) -> tuple[str, ...]:
    """List the levels whose modules a validation reads.

    Raises:
        ValueError: If an argument names no level.
    """
    if validate is None:
        return ()
    subject = f"validate {location(validate)}"
    return level_arguments(read_parameters(validate, levels, subject), levels, subject)


def check_options_of_engine(callbacks: Sequence[Callback], *, rollback: bool, compile: bool, check: bool | int) -> None:
    """Check options of ``Engine``.

    Raises:
        TypeError: If a callback is no :class:`Callback`.
        ValueError: If an option is out of range, or two options exclude each other.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = f"; write {callback.__name__}()" if isinstance(callback, type) else ""
            raise TypeError(f"callbacks: {callback!r} is not a nestor.callbacks.Callback{hint}.")
    if not isinstance(check, int) or check < 0 or (compile and check > 1):
        raise ValueError(f"Engine(check={check!r}) must be True, False or, without compile=True, an integer > 0.")
    if compile and rollback:
        raise ValueError("Engine(compile=True, rollback=True): a look-ahead is not compiled. Choose one.")
