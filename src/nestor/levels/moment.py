"""A level at one moment of a run: its batches, and the steps that led there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from nestor.autodiff.randomness import Seeded
from nestor.levels.level import Draw, Level
from nestor.optim.state import Place, State, Stored, keep
from nestor.optim.update import OptimizerUpdate, Update
from nestor.responses.unrolling.trajectory import StepGraph
from nestor.vectors.algebra import Params

_NOTHING: Mapping[Any, Any] = MappingProxyType({})

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
        kept: The graph of its gradient, if that is kept.
    """

    draws: tuple[Draw, ...]
    update: Update
    buffers: Sequence[Buffers] = ()
    below: Moments = field(default_factory=dict)
    kept: StepGraph | None = None


class Moment(NamedTuple):
    """What the levels above need to know of a level.

    Attributes:
        draws: The batches of its last step.
        values: Its variables; None means the module's present ones.
        records: The steps that led to them, oldest first.
        states: States before some of these steps, by index; the first one's if there are records.
        uppers: Variables of levels above as they were along these steps, where they have changed since.
        gradients: The gradients of the last of these steps, oldest first, if they were kept.
        input_gradients: The gradient of the last step's objective in the variables of levels above, if it was kept.
        ahead: Whether the records are steps to be taken from the present state on.
        after: What the optimizer keeps after the last step, one mapping a variable, where no state before it is known.
        once: Whether it is for one response, which may use up its cotangent and the gradients.
    """

    draws: tuple[Draw, ...]
    values: Params | None = None
    records: Sequence[Record] = ()
    states: Mapping[int, Stored] = _NOTHING
    uppers: Mapping[str, Params] = _NOTHING
    gradients: Sequence[Sequence[Tensor | None]] = ()
    ahead: bool = False
    input_gradients: Mapping[str, Sequence[Tensor | None]] = _NOTHING
    after: Sequence[Mapping[str, Any]] | None = None
    once: bool = False


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


def pack(moment: Moment, level: Level, levels: Mapping[str, Level]) -> dict[str, Any]:
    """Write a moment of a run as plain data, with whole vectors."""
    after = None
    if moment.after is not None and moment.values is not None:  # else that of the optimizer, which is written anyway
        after = pack_slots(moment.after, moment.values, level.whole)
    return {
        "draws": pack_draws(moment.draws),
        "values": None if moment.values is None else level.whole(moment.values),
        "records": [
            {
                "draws": pack_draws(record.draws),
                "groups": record.update.groups if isinstance(record.update, OptimizerUpdate) else None,
                "buffers": [list(b) for b in record.buffers],
                "below": {name: pack(below, levels[name], levels) for name, below in record.below.items()},
            }
            for record in moment.records
        ],
        "states": {index: pack_state(stored(), level.whole) for index, stored in moment.states.items()},
        "uppers": {name: levels[name].whole(values) for name, values in moment.uppers.items()},
        "gradients": [level.whole(g) for g in moment.gradients],
        "input_gradients": {name: levels[name].whole(g) for name, g in moment.input_gradients.items()},
        "after": after,
    }


def unpack(data: Mapping[str, Any], level: Level, levels: Mapping[str, Level], place: Place = None) -> Moment:
    """Read a moment back; the update rules take the optimizers of ``levels``, with the hyperparameters of then."""
    records = []
    for record in data["records"]:
        rule = level.rule()
        if isinstance(rule, OptimizerUpdate):
            # Learned hyperparameters stay the tensors that they are: their values come with the levels above.
            groups = [
                {key: now[key] if isinstance(now.get(key), Tensor) else value for key, value in then.items()}
                for then, now in zip(record["groups"], rule.groups, strict=True)
            ]
            rule = replace(rule, groups=groups)
        below = {name: unpack(moment, levels[name], levels) for name, moment in record["below"].items()}
        records.append(Record(unpack_draws(record["draws"]), rule, record["buffers"], below))
    values, after = data["values"], data["after"]
    return Moment(
        draws=unpack_draws(data["draws"]),
        values=None if values is None else _present(level.part(values)),
        records=records,
        states={index: keep(unpack_state(state, level.part), place) for index, state in data["states"].items()},
        uppers={name: _present(levels[name].part(values)) for name, values in data["uppers"].items()},
        gradients=[level.part(g) for g in data["gradients"]],
        input_gradients={name: levels[name].part(g) for name, g in data["input_gradients"].items()},
        after=None if after is None else pack_slots(after, values, level.part),
    )


Through: TypeAlias = Callable[[Sequence[Tensor | None]], list[Tensor | None]]


def pack_state(state: State, whole: Through) -> dict[str, Any]:
    """Write a state of variables and slots, with whole vectors."""
    return {"params": whole(state.params), "slots": pack_slots(state.slots, state.params, whole)}


def unpack_state(data: Mapping[str, Any], part: Through) -> State:
    """Read it back."""
    return State(_present(part(data["params"])), pack_slots(data["slots"], data["params"], part))


def pack_slots(slots: Sequence[Mapping[str, Any]], like: Sequence[Tensor], through: Through) -> list[dict[str, Any]]:
    """Pass the vectors among an optimizer's slots, those of the variables' shapes, through a function."""
    packed = [dict(slot) for slot in slots]
    if len(slots) != len(like):  # of a rule of the user's own
        return packed
    for key in dict.fromkeys(key for slot in slots for key in slot):
        found = [
            slot[key] if isinstance(slot.get(key), Tensor) and slot[key].shape == p.shape and key != "step" else None
            for slot, p in zip(slots, like, strict=True)
        ]
        for slot, value in zip(packed, through(found), strict=True):
            if value is not None:
                slot[key] = value
    return packed


def _present(values: Sequence[Tensor | None]) -> list[Tensor]:
    return [v for v in values if v is not None]


def pack_draws(draws: Sequence[Draw]) -> list[tuple[Any, int]]:
    """Write the batches of a run as plain data."""
    # The batches of a run are drawn on seeds.
    return [(draw.batch, draw.randomness.seed) for draw in draws if isinstance(draw.randomness, Seeded)]


def unpack_draws(draws: Sequence[tuple[Any, int]]) -> tuple[Draw, ...]:
    """Read them back."""
    return tuple(Draw(batch, Seeded(seed)) for batch, seed in draws)
