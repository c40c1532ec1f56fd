"""Planned histories: the steps that levels are about to take, for evaluations outside a run."""

from collections.abc import Mapping
from typing import Any

from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.optim.history import Histories, LevelHistory, StepRecord
from nestor.optim.state import keep
from nestor.vectors import Params


def planned_histories(evaluator: Evaluator, level: Level, batches: Mapping[str, Any] | None) -> dict[str, LevelHistory]:
    """Plan the steps of the levels below ``level`` from the current variables, on given batches.

    Raises:
        ValueError: If a batch is missing or belongs to no level.
    """
    batches = {} if batches is None else batches
    for name in batches:
        if name not in evaluator.levels:
            known = ", ".join(map(repr, evaluator.levels))
            raise ValueError(
                f"batches holds one of {name!r}: the program has no level {name!r}; its levels are {known}."
            )
    randomness = Captured.now()
    found: dict[str, LevelHistory] = {}
    below = evaluator.below(level.name)
    for name in below:
        needed = evaluator.levels[name]
        if needed.loss.takes_batch and name not in batches:
            wanted = [other for other in below if evaluator.levels[other].loss.takes_batch]
            raise ValueError(
                f"The objective of level {level.name!r} needs a batch of level {name!r}: "
                f"batches={{{', '.join(f'{other!r}: ...' for other in wanted)}}}."
            )
        draws = (Draw(batches.get(name), randomness),)
        lowers = {other: found[other] for other in evaluator.below(name)[:-1]}
        found[name] = LevelHistory(draws) if needed is level else planned_history(needed, draws, lowers)
    return found


def planned_history(level: Level, draws: tuple[Draw, ...], below: Histories) -> LevelHistory:
    """Plan the first steps of a level, all on the same batches, if its response differentiates steps."""
    spec = level.response.history_spec
    if spec is None and level.problem.init is None:
        return LevelHistory(draws)
    count = max(level.problem.unroll_steps, (spec.window or 1) if spec is not None else 1)
    rule = level.stepping.rule()
    steps = [
        StepRecord(tuple(draw._replace(step=step) for draw in draws), rule.at_step(step), below=below)
        for step in range(count)
    ]
    states = {0: keep(level.stepping.first_state(_start(level)))}
    restarts = level.problem.init is not None
    return LevelHistory(draws, steps=steps, states=states, planned=True, restarts=restarts)


def _start(level: Level) -> Params:
    """Return the variables from which the planned steps start, for a level above that is a constant."""
    if level.problem.init is None:
        return level.parameters
    start = level.loss.variables[level.problem.init]
    return [start[place].expand_as(p) for place, p in zip(level.links.init_indices, level.parameters, strict=True)]
