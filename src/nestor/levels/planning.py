"""Planned histories: the steps that levels are about to take, for evaluations outside a run."""

from collections.abc import Mapping
from typing import Any

from nestor.data.draws import Captured, Draw
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.optim.history import Histories, LevelHistory, StepRecord
from nestor.optim.update import keep


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
    """Plan the steps that a level is about to take, all on the same batches, if its response differentiates steps."""
    spec = level.response.history_spec
    if spec is None and level.problem.init is None:
        return LevelHistory(draws)
    record = StepRecord(draws, level.stepping.rule(), below=below)
    steps = max(level.problem.unroll_steps, (spec.window or 1) if spec is not None else 1)
    states = {0: keep(level.stepping.first_state(level.parameters))}
    return LevelHistory(draws, steps=[record] * steps, states=states, planned=True)
