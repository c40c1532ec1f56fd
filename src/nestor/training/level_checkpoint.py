"""The state of a level as plain data with whole vectors, for checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.data.draws import Draw
from nestor.data.move import move
from nestor.data.random_numbers import Seeded
from nestor.levels.level import Gradient, Level
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.state import OffloadTo, State, keep
from nestor.solvers import SolveState
from nestor.training.level_state import LevelMetrics, LevelState
from nestor.training.snapshot import Snapshot, load_optimizer, optimizer_dict
from nestor.vectors import algebra

Through: TypeAlias = Callable[[Sequence[Tensor | None]], list[Tensor | None]]
"""Gathers shards of vectors into whole vectors, or returns this process's shards of whole vectors."""


ENTRIES = frozenset(
    [
        *("steps", "ready", "restarts", "scaling", "constants", "watch", "draws", "optimizer", "scheduler"),
        *("slots", "metrics", "history", "graphs", "variables", "solves", "snapshot"),
    ]
)
"""The entries of the state of a level."""


def level_state_dict(state: LevelState, levels: Mapping[str, Level]) -> dict[str, Any]:
    """Return the state of a level without its module.

    Args:
        state: The state of the level.
        levels: All levels of the program.
    """
    level, problem, scaling = state.level, state.level.problem, state.level.loss.scaling
    draws = state.draws.state_dict()
    return {
        "steps": state.steps,
        "ready": sorted(state.ready),
        "restarts": state.restarts,
        "scaling": scaling.state_dict() if scaling is not None else None,
        "constants": None if level.loss.reader.constants is None else level.loss.reader.constants.state_dict(),
        "watch": level.loss.reader.watch.state_dict(),
        "draws": {**draws, "prefetched": [_pack_draws(step) for step in draws["prefetched"]]},
        "optimizer": None if problem.optimizer is None else _gathered(optimizer_dict(problem.optimizer), level),
        "scheduler": problem.scheduler.state_dict() if problem.scheduler is not None else None,
        "slots": [dict(slot) for slot in state.memory.slots],
        "metrics": _metrics_dict(state.metrics),
        "history": _pack(state.present_history(), level, levels),
        "graphs": state.kept.graphs,
        "variables": level.copies() if problem.tasks is not None else None,
        "solves": {
            name: {**vars(solve), "value": levels[name].gather(solve.value) if solve.value else []}
            for name, solve in state.solves.items()
        },
        "snapshot": None if state.snapshot is None else vars(state.snapshot),
    }


def load_level_state(state: LevelState, saved: Mapping[str, Any], levels: Mapping[str, Level]) -> None:
    """Load what :func:`level_state_dict` returned; ``levels`` are all levels of the program."""
    level, problem = state.level, state.level.problem
    saved = on_device(saved, level.parameters[0].device)
    state.steps, state.ready, state.restarts = saved["steps"], set(saved["ready"]), saved["restarts"]
    if level.loss.reader.constants is not None:
        level.loss.reader.constants.load_state_dict(saved["constants"])
    level.loss.reader.watch.load_state_dict(saved["watch"])
    if (scaling := level.loss.scaling) is not None and saved["scaling"] is not None:
        scaling.load_state_dict(saved["scaling"])
    if problem.optimizer is not None:
        load_optimizer(problem.optimizer, _gathered(saved["optimizer"], level, back=True))
    if problem.scheduler is not None:
        problem.scheduler.load_state_dict(saved["scheduler"])
    state.memory.slots = list(saved["slots"])
    if saved["variables"] is not None:
        with torch.no_grad():
            algebra.copy_(level.parameters, saved["variables"])
    _load_metrics(state.metrics, saved["metrics"])
    state.solves = {
        name: SolveState(**{**s, "value": algebra.present(levels[name].shard(s["value"])) if s["value"] else []})
        for name, s in saved["solves"].items()
    }
    offload_to = None if state.history is None else state.history.spec.offload_to
    history = _unpack(saved["history"], level, levels, offload_to)
    state.uppers_then = dict(history.uppers)
    if state.history is not None:
        state.history.load(history)
    state.kept.graphs = saved["graphs"]
    draws = saved["draws"]
    prefetched = [_unpack_draws(step) for step in draws["prefetched"]]
    state.draws.load_state_dict({**draws, "prefetched": prefetched}, history.draws)
    state.snapshot = None if saved["snapshot"] is None else Snapshot(**saved["snapshot"])


def on_device(saved: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move recorded steps, batches, solves and update memory to the device of a level, since files are read to the CPU.

    The data, the optimizer and the schedule place their own state. Counters stay where the optimizers read them.
    """
    if device.type == "cpu":
        return dict(saved)
    moved = {name: _moved(saved[name], device) for name in ("history", "solves", "metrics", "snapshot")}
    moved["slots"] = _moved(saved["slots"], device, is_memory=True)
    moved["draws"] = {**saved["draws"], "prefetched": _moved(saved["draws"]["prefetched"], device)}
    return {**saved, **moved}


def _moved(part: Any, device: torch.device, *, is_memory: bool = False) -> Any:
    if type(part) is dict:
        return {
            key: value
            if is_memory and key == "step"
            else _moved(value, device, is_memory=is_memory or key in ("slots", "slots_after", "optimizer"))
            for key, value in part.items()
        }
    if type(part) in (list, tuple):
        return type(part)(_moved(value, device, is_memory=is_memory) for value in part)
    return move(part, device)


def _metrics_dict(metrics: LevelMetrics) -> dict[str, Any]:
    kept = metrics.gradient
    return {
        "gradient": None if kept is None else {"loss": kept.loss, "metrics": dict(kept.metrics), "norm": kept.norm},
        "first_norm": metrics.first_norm,
        "callback_metrics": dict(metrics.callback_metrics),
        "has_warned": metrics.has_warned,
    }


def _load_metrics(metrics: LevelMetrics, saved: Mapping[str, Any]) -> None:
    kept = saved["gradient"]
    metrics.gradient = None if kept is None else Gradient(values=[], cotangents={}, **kept)
    metrics.first_norm, metrics.has_warned = saved["first_norm"], saved["has_warned"]
    metrics.callback_metrics = dict(saved["callback_metrics"])


def _gathered(state: dict[str, Any], level: Level, *, back: bool = False) -> dict[str, Any]:
    """Gather the vectors of an optimizer's state; with ``back``, return this process's shards of whole vectors."""
    optimizer = level.problem.optimizer
    if level.loss.placements is None or optimizer is None:
        return state
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    places = [held.index(id(p)) for p in level.parameters]
    slots = [state["state"].get(place, {}) for place in places]
    like = level.gather(level.parameters) if back else level.parameters
    packed = _pack_slots(slots, algebra.present(like), level.shard if back else level.gather)
    changed = {place: slot for place, slot in zip(places, packed, strict=True) if slot}
    return {**state, "state": {**state["state"], **changed}}


def _pack(history: LevelHistory, level: Level, levels: Mapping[str, Level]) -> dict[str, Any]:
    """Convert a history to plain data; its graphs are not saved."""
    after = None
    if history.slots_after is not None and history.values is not None:  # else the optimizer's state contains them
        after = _pack_slots(history.slots_after, history.values, level.gather)
    return {
        "draws": _pack_draws(history.draws),
        "values": None if history.values is None else level.gather(history.values),
        "steps": [
            {
                "draws": _pack_draws(record.draws),
                "hyperparameters": [dict(group) for group in record.update.groups],
                "buffers": [list(b) for b in record.buffers],
                "below": {name: _pack(below, levels[name], levels) for name, below in record.below.items()},
            }
            for record in history.steps
        ],
        "states": {index: _pack_state(stored(), level.gather) for index, stored in history.states.items()},
        "uppers": {name: levels[name].gather(values) for name, values in history.uppers.items()},
        "gradients": [level.gather(g) for g in history.gradients],
        "input_gradients": {name: levels[name].gather(g) for name, g in history.input_gradients.items()},
        "slots_after": after,
    }


def _unpack(
    data: Mapping[str, Any], level: Level, levels: Mapping[str, Level], offload_to: OffloadTo = None
) -> LevelHistory:
    """Rebuild a history; its rules are those of the optimizers of ``levels``, with the recorded hyperparameters."""
    rule, taken = level.stepping.rule, [_unpack_draws(step["draws"]) for step in data["steps"]]
    steps = [
        StepRecord(
            draws,
            rule().with_recorded(step["hyperparameters"]).at_step(draws[0].step),
            step["buffers"],
            {name: _unpack(below, levels[name], levels) for name, below in step["below"].items()},
        )
        for draws, step in zip(taken, data["steps"], strict=True)
    ]
    values, after = data["values"], data["slots_after"]
    return LevelHistory(
        draws=_unpack_draws(data["draws"]),
        values=None if values is None else algebra.present(level.shard(values)),
        steps=steps,
        states={i: keep(_unpack_state(state, level.shard), offload_to) for i, state in data["states"].items()},
        uppers={name: algebra.present(levels[name].shard(values)) for name, values in data["uppers"].items()},
        gradients=[level.shard(g) for g in data["gradients"]],
        input_gradients={name: levels[name].shard(g) for name, g in data["input_gradients"].items()},
        slots_after=None if after is None else _pack_slots(after, values, level.shard),
    )


def _pack_state(state: State, gather: Through) -> dict[str, Any]:
    return {"params": gather(state.params), "slots": _pack_slots(state.slots, state.params, gather)}


def _unpack_state(data: Mapping[str, Any], shard: Through) -> State:
    return State(algebra.present(shard(data["params"])), _pack_slots(data["slots"], data["params"], shard))


def _pack_slots(slots: Sequence[Mapping[str, Any]], like: Sequence[Tensor], through: Through) -> list[dict[str, Any]]:
    """Apply a function to the vectors in an optimizer's slots: the tensors with the shapes of the variables."""
    packed = [dict(slot) for slot in slots]
    if len(slots) != len(like):  # a user's rule may have any number of slots
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


def _pack_draws(draws: Sequence[Draw]) -> list[tuple[Any, int, int]]:
    """Convert the draws of a run to plain data."""
    # All draws of a run have seeds.
    return [(draw.batch, draw.randomness.seed, draw.step) for draw in draws if isinstance(draw.randomness, Seeded)]


def _unpack_draws(draws: Sequence[tuple[Any, int, int]]) -> tuple[Draw, ...]:
    """Rebuild the draws of a run."""
    return tuple(Draw(batch, Seeded(seed), step) for batch, seed, step in draws)
