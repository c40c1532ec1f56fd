"""A level at one moment of a run: its batches, and the steps that led there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from nestor.level import Draw, Level
from nestor.optim.state import Stored, keep
from nestor.optim.update import Update
from nestor.tree import Params

Buffers: TypeAlias = "Sequence[Tensor | None]"
"""Values of the buffers that a loss reads (``Level.buffer_values``)."""


@dataclass(frozen=True)
class Record:
    """One optimizer step, noted before it is taken, so that it can be taken again.

    Attributes:
        draws: Its batches.
        update: The rule, with the hyperparameters of that step.
        buffers: Values of the buffers that the level's loss reads before each batch; empty: the present ones.
        below: The levels below, as they were.
    """

    draws: tuple[Draw, ...]
    update: Update
    buffers: Sequence[Buffers] = ()
    below: Moments = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """What the levels above need to know of a level.

    Attributes:
        draws: The batches of its last step.
        values: Its variables; None means the module's present ones.
        records: The steps that led to them, oldest first.
        states: States before some of these steps, by index; the first one's if there are records.
        uppers: Variables of levels above as they were along these steps, where they have changed since.
        gradients: The gradients of the last of these steps, oldest first, if they were kept.
        ahead: Whether the records are steps to be taken from the present state on.
    """

    draws: tuple[Draw, ...]
    values: Params | None = None
    records: Sequence[Record] = ()
    states: Mapping[int, Stored] = field(default_factory=dict)
    uppers: Mapping[str, Params] = field(default_factory=dict)
    gradients: Sequence[Sequence[Tensor | None]] = ()
    ahead: bool = False


Moments: TypeAlias = Mapping[str, Moment]
"""A moment of every level that is needed, by name."""


def ahead(level: Level, draws: tuple[Draw, ...], below: Moments) -> Moment:
    """Plan the steps that a level is about to take, all on the same batches, if its response needs to know them."""
    recording = level.response.recording
    if recording is None and level.problem.init is None:
        return Moment(draws)
    rule = level.rule()
    record = Record(draws, rule, below=below)
    steps = max(level.problem.unroll_steps, recording.window or 1 if recording is not None else 1)
    return Moment(draws, records=[record] * steps, states={0: keep(level.state(rule))}, ahead=True)
