"""The adaptation of a copy of a level to a task that the program has not seen."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nestor.data.draws import Draw
from nestor.data.random_numbers import Seeded, untouched
from nestor.data.seeds import mix
from nestor.errors import NonFiniteError
from nestor.levels.copies import copy_of, replaced
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.loss import Value
from nestor.optim.state import State
from nestor.vectors import LOCAL, algebra


def adapted(evaluator: Evaluator, level: Level, batch: Any, steps: int | None) -> nn.Module:
    """Return a copy of a level's module after steps of the level on one batch; see :meth:`Program.adapt`."""
    if steps is None:
        steps = level.problem.unroll_steps
    _check(evaluator, level, steps)
    # The modules contain whole variables; those of a level with tasks are the start of each task.
    variables = {name: _in_module(other) for name, other in evaluator.levels.items()}
    loss = replace(level.loss, tasks=None, placements=None, variables=variables)
    rule = replace(level.stepping, tasks=False, space=LOCAL).rule()
    inputs = {name: variables[name] for name in level.links.dependencies}
    constants = {name: [p.detach() for p in variables[name]] for name in level.loss.slots}
    start: Sequence[Tensor] = variables[level.name]
    if level.problem.init is not None:
        start = [variables[level.problem.init][place] for place in level.links.init_indices]
    state = State([p.detach().clone() for p in start], rule.first_slots(len(start)))
    buffers = loss.buffer_values()
    with untouched(), torch.enable_grad():
        seed = int(torch.randint(2**62, ()).item())
        for step in range(steps):
            theta = algebra.leaves(state.params)

            def evaluate(draw: Draw, theta: Sequence[Tensor] = theta) -> Value:
                return loss.moving_value(draw, {**constants, level.name: theta}, buffers)

            draws = [Draw(batch, Seeded(mix(seed, step)), step)]
            value, _, grads = evaluator.differentiate(level, draws, evaluate, theta)
            finite = [g.isfinite().all() for g in grads if g is not None]
            if not bool(torch.stack([value.isfinite(), *finite]).all()):
                raise NonFiniteError(
                    f"Step {step + 1} of the adaptation is not finite: the loss is {value.item():.3g}. Is the learning "
                    "rate too large, or the batch bad?",
                    level=level.name,
                    where=loss.where,
                )
            state = rule.step(state, grads, inputs)
    module, trained = level.problem.module, {id(p): p.requires_grad for p in variables[level.name]}
    parameters = {
        name: nn.Parameter(value.detach().clone(), requires_grad=trained[id(own)])
        for name, own, value in zip(level.names, variables[level.name], state.params, strict=True)
    }
    moved = {id(slot[0][slot[1]]): b for (_, slot), b in zip(loss.buffers, buffers, strict=False) if b is not None}
    return copy_of(module, {**moved, **replaced(level, parameters)})


def _in_module(level: Level) -> list[nn.Parameter]:
    own = dict(level.problem.module.named_parameters())
    return [own[name] for name in level.names]


def _check(evaluator: Evaluator, level: Level, steps: int) -> None:
    if type(steps) is not int or steps < 0:
        raise ValueError(f"Program.adapt(steps={steps!r}) must be an integer of at least 0.")
    subject = f"Level {level.name!r} cannot be adapted to one batch"
    if level.problem.optimizer is None and level.problem.update is None:
        raise ValueError(
            f"{subject}: it has no optimizer and no update. Problem(..., optimizer=...) says how it steps."
        )
    if level.lowers:
        raise ValueError(
            f"{subject}: its objective contains the best responses of {', '.join(map(repr, level.lowers))}, which have "
            "batches of their own. Adapt a level without lowers."
        )
    tasks = [name for name in level.loss.slots if name != level.name and evaluator.levels[name].problem.tasks]
    if tasks:
        raise ValueError(f"{subject}: its loss reads {tasks[0]!r}, which has one copy for each task of the run.")
