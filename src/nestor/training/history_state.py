"""Histories of a run as plain data with whole vectors, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from nestor.levels.level import Level
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.state import OffloadTo, State, keep
from nestor.training.draws import pack_draws, unpack_draws
from nestor.vectors import algebra

Through: TypeAlias = Callable[[Sequence[Tensor | None]], list[Tensor | None]]
"""Gathers vectors like a level's variables, or takes this process's shards of whole ones."""


def pack(history: LevelHistory, level: Level, levels: Mapping[str, Level]) -> dict[str, Any]:
    """Write a history; its graphs are not kept."""
    after = None
    if history.slots_after is not None and history.values is not None:  # else the optimizer's state holds them
        after = pack_slots(history.slots_after, history.values, level.gather)
    return {
        "draws": pack_draws(history.draws),
        "values": None if history.values is None else level.gather(history.values),
        "steps": [
            {
                "draws": pack_draws(record.draws),
                "hyperparameters": [dict(group) for group in record.update.groups],
                "buffers": [list(b) for b in record.buffers],
                "below": {name: pack(below, levels[name], levels) for name, below in record.below.items()},
            }
            for record in history.steps
        ],
        "states": {index: _pack_state(stored(), level.gather) for index, stored in history.states.items()},
        "uppers": {name: levels[name].gather(values) for name, values in history.uppers.items()},
        "gradients": [level.gather(g) for g in history.gradients],
        "input_gradients": {name: levels[name].gather(g) for name, g in history.input_gradients.items()},
        "slots_after": after,
    }


def unpack(
    data: Mapping[str, Any], level: Level, levels: Mapping[str, Level], offload_to: OffloadTo = None
) -> LevelHistory:
    """Read a history; the rules are those of the optimizers of ``levels``, with the hyperparameters of then."""
    steps = [
        StepRecord(
            unpack_draws(step["draws"]),
            level.stepping.rule().with_recorded(step["hyperparameters"]),
            step["buffers"],
            {name: unpack(below, levels[name], levels) for name, below in step["below"].items()},
        )
        for step in data["steps"]
    ]
    values, after = data["values"], data["slots_after"]
    return LevelHistory(
        draws=unpack_draws(data["draws"]),
        values=None if values is None else algebra.present(level.shard(values)),
        steps=steps,
        states={i: keep(_unpack_state(state, level.shard), offload_to) for i, state in data["states"].items()},
        uppers={name: algebra.present(levels[name].shard(values)) for name, values in data["uppers"].items()},
        gradients=[level.shard(g) for g in data["gradients"]],
        input_gradients={name: levels[name].shard(g) for name, g in data["input_gradients"].items()},
        slots_after=None if after is None else pack_slots(after, values, level.shard),
    )


def _pack_state(state: State, gather: Through) -> dict[str, Any]:
    return {"params": gather(state.params), "slots": pack_slots(state.slots, state.params, gather)}


def _unpack_state(data: Mapping[str, Any], shard: Through) -> State:
    return State(algebra.present(shard(data["params"])), pack_slots(data["slots"], data["params"], shard))


def pack_slots(slots: Sequence[Mapping[str, Any]], like: Sequence[Tensor], through: Through) -> list[dict[str, Any]]:
    """Pass the vectors among an optimizer's slots, those of the variables' shapes, through a function."""
    packed = [dict(slot) for slot in slots]
    if len(slots) != len(like):  # of a user's rule
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
