"""Planned steps as the history that an engine would have built of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nestor.levels.level import Level
from nestor.optim.history import GradientGraph, HistoryBuilder, LevelHistory
from nestor.optim.update import State


def taken_steps(
    planned: LevelHistory,
    level: Level,
    state: Callable[[], State] | None = None,
    graph: Callable[[], GradientGraph] | None = None,
) -> HistoryBuilder | None:
    """Note planned steps as if they were taken, in memory; None if the level's response needs no history.

    Args:
        planned: The planned steps.
        level: The level.
        state: Returns the state before each step; None takes that before the first one.
        graph: Returns the graph of each step's gradient; None keeps none.
    """
    spec = level.response.history_spec
    if spec is None or not planned.steps:
        return None
    builder = HistoryBuilder(replace(spec, offload_to=None))
    for record in planned.steps[: spec.count(len(planned.steps))]:
        builder.note(record, state or planned.states[0])
        if graph is not None:
            builder.keep_graph(graph())
    return builder
