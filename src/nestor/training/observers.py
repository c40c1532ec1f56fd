"""The callbacks of a run together: when one is due, which checkpoint they find, and how they are called."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nestor.errors import CheckpointError, note
from nestor.errors.options import typed
from nestor.training.callback import Callback
from nestor.training.run import Run


def next_due(run: Run, callbacks: Iterable[Callback], last: int) -> int:
    """Return the next engine step after which a callback or a validation is due, or ``last`` if none is before it."""
    for step in range(run.step + 1, last):
        if validates_after(run, step) or any(callback.is_due(run, step) for callback in callbacks):
            return step
    return last


def validates_after(run: Run, step: int) -> bool:
    """Return whether a validation is due after an engine step that is not the last one."""
    every = run.validate_every
    return every > 0 and step % every == 0


def is_observed(run: Run, callbacks: Iterable[Callback], step: int) -> bool:
    """Return whether a callback must run after the step of each level in an engine step."""
    return any(observes_levels(callback) and callback.is_due(run, step) for callback in callbacks)


def notify(run: Run, callbacks: Iterable[Callback], event: str, *details: Any) -> None:
    """Call a method of each callback; those with ``only_first`` are called in the first process only."""
    for callback in callbacks:
        if run.runtime.rank == 0 or not callback.only_first:
            call(callback, event, run, details)


def observes_levels(callback: Callback) -> bool:
    """Return whether a callback has something to do after the step of a level."""
    return type(callback).on_level_step is not Callback.on_level_step


@typed
def checkpoint_of(resume: str | os.PathLike[str], callbacks: Iterable[Callback]) -> Path | None:
    """Return the folder of the checkpoint that a run continues from; None if there is none yet.

    Args:
        resume: A folder; or ``"latest"``, the newest checkpoint of the first callback that writes any.
        callbacks: The callbacks of the run.

    Raises:
        TypeError: If ``resume`` is no path.
        ValueError: If ``resume`` is ``"latest"``, and no callback writes checkpoints.
    """
    if resume != "latest":
        return Path(resume)
    for callback in callbacks:
        if type(callback).latest is not Callback.latest:
            return callback.latest()
    raise ValueError(
        'Engine.run(resume="latest") has no Checkpoint among the callbacks to find the newest checkpoint: '
        "Engine(program, callbacks=[nestor.callbacks.Checkpoint(folder)])."
    )


def newest_checkpoint(callbacks: Iterable[Callback]) -> Path | None:
    """Return the newest whole checkpoint that a callback of the run has written; None if there is none."""
    try:
        return next((folder for callback in callbacks if (folder := callback.latest()) is not None), None)
    except CheckpointError:  # none is whole
        return None


def call(callback: Callback, event: str, engine: Run, details: tuple[Any, ...]) -> None:
    """Call a method of a callback; an exception that it raises is noted with the callback's class and the step."""
    try:
        getattr(callback, event)(engine, *details)
    except Exception as error:
        note(error, f"callback {type(callback).__name__}, {event}, step {engine.step}")
        raise
