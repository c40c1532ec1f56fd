"""Builds the levels of a program from its problems: chooses their variables and validates what was declared."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from nestor.errors import UnsupportedError
from nestor.levels.edges import Declared, connect
from nestor.levels.function_update import FunctionUpdate
from nestor.levels.learned import learned_hyperparameters
from nestor.levels.level import Level, Links, Stepping
from nestor.levels.loss import LevelLoss
from nestor.levels.reader import Reader
from nestor.levels.refusals import refuse_problems
from nestor.levels.signatures import STEP, Signature, location, read_loss, read_update
from nestor.levels.tasks import TaskMap, Tasks
from nestor.optim.hyperparameters import Learned
from nestor.problem import Problem, reformulate


def build(problems: Mapping[str, Problem]) -> dict[str, Level]:
    """Build and validate the levels of a program, by name, lowest first.

    Raises:
        TypeError: If a value is no :class:`Problem`.
        ValueError: If the program is not well formed; the message names level, loss, cause and remedy.
        UnsupportedError: If a module is wrapped, a scheduler needs a metric, a variable is complex, or a hyperparameter
            or a step of an optimizer is not differentiated.
    """
    if not problems:
        raise ValueError("Program() has no level. Write Program(name=nestor.Problem(...), ...), lowest level first.")
    for name, problem in problems.items():
        if not isinstance(problem, Problem):
            raise TypeError(f"Level {name!r} must be a nestor.Problem, got {type(problem).__name__}.")
    if STEP in problems:
        raise ValueError(
            f"A level cannot be called {STEP!r}: an argument of that name receives the number of steps of a level. "
            "Choose another name."
        )
    refuse_problems(problems)
    declared = _declare(reformulate(problems))
    _check_disjoint(declared.values())
    learned = {name: learned_hyperparameters(level, declared) for name, level in declared.items()}
    links = connect(declared, learned)
    # A level with tasks optimizes stacked copies of its module's parameters, one for each task.
    variables = {name: _stack(level.parameters.values(), level.problem.tasks) for name, level in declared.items()}
    tasks = {
        name: Tasks(name, level.problem.tasks, level.problem.vectorize)
        for name, level in declared.items()
        if level.problem.tasks is not None
    }
    return {name: _level(declared[name], declared, links[name], variables, learned[name], tasks) for name in declared}


def _declare(problems: Mapping[str, Problem]) -> dict[str, Declared]:
    names = tuple(problems)
    levels = {}
    for index, (name, problem) in enumerate(problems.items()):
        loss = read_loss(name, problem, names)
        parameters = _choose_parameters(problem, loss)
        levels[name] = Declared(index, problem, loss, *read_update(name, problem, names), parameters)
        if problem.init is not None and problem.init not in names[index + 1 :]:
            known = ", ".join(map(repr, names))
            raise loss.error(f"init={problem.init!r} is not the name of a level above it (the levels are {known}).")
    return levels


def _choose_parameters(problem: Problem, loss: Signature) -> dict[str, nn.Parameter]:
    """Choose which parameters of the module a level optimizes, in the order of ``module.named_parameters()``."""
    named = {id(p): (name, p) for name, p in problem.module.named_parameters()}
    stepped = [p for group in problem.optimizer.param_groups for p in group["params"]] if problem.optimizer else []
    if stepped and not any(id(p) in named for p in stepped):
        raise loss.error(
            "the optimizer holds none of the module's parameters. Make it from the same module: "
            "SGD(module.parameters(), ...), after any call that replaces parameters."
        )
    if problem.variables is not None:
        chosen = list(problem.variables)
        for p in chosen:
            if id(p) not in named:
                raise loss.error(f"variables holds a tensor of shape {tuple(p.shape)} that the module does not hold.")
            if not p.requires_grad:
                raise loss.error(f"the variable {named[id(p)][0]!r} does not require a gradient: requires_grad_().")
            if stepped and not any(q is p for q in stepped):
                raise loss.error(f"the variable {named[id(p)][0]!r} is not in the optimizer, so no step changes it.")
    else:
        chosen = [p for p in stepped or (p for _, p in named.values()) if p.requires_grad and id(p) in named]
    if not chosen:
        raise loss.error("the level has no variable: no parameter of its module requires a gradient.")
    if numbers := [named[id(p)][0] for p in chosen if p.is_complex()]:
        raise UnsupportedError(
            f"Its variable {numbers[0]!r} is complex. Hold real and imaginary parts as one real parameter, "
            "nn.Parameter(torch.view_as_real(value)), and use torch.view_as_complex(parameter) in the module or the "
            "loss; complex tensors that are no variables may stay.",
            level=loss.level,
            where=loss.location,
        )
    wanted = {id(p) for p in chosen}
    return {name: p for key, (name, p) in named.items() if key in wanted}


def _check_disjoint(levels: Iterable[Declared]) -> None:
    owner: dict[int, Declared] = {}
    for level in levels:
        for name, parameter in level.parameters.items():
            other = owner.setdefault(id(parameter), level)
            if other is not level:
                raise level.loss.error(
                    f"its variable {name!r} is a variable of level {other.name!r} too. Give both levels disjoint "
                    "variables=..."
                )


def _stack(parameters: Iterable[nn.Parameter], tasks: int | None) -> tuple[nn.Parameter, ...]:
    if tasks is None:
        return tuple(parameters)
    return tuple(nn.Parameter(torch.stack([p.detach()] * tasks)) for p in parameters)


def _level(
    level: Declared,
    levels: Mapping[str, Declared],
    links: Links,
    variables: Mapping[str, tuple[nn.Parameter, ...]],
    learned: Learned,
    tasks: Mapping[str, Tasks],
) -> Level:
    reads = links.direct_reads
    problem = level.problem
    modules = {argument: levels[name].problem.module for argument, name in level.loss.arguments.items()}
    reader = Reader(problem.loss, modules, takes_step=level.loss.takes_step)
    owned = {id(p) for other in levels.values() for p in other.parameters.values()}
    reader.watch_constants(level.name, owned, variables[level.name])
    below = {module for name in links.lower_levels for module in levels[name].problem.module.modules()}
    loss = LevelLoss(
        level=level.name,
        where=level.loss.location,
        takes_batch=level.loss.takes_batch,
        reader=reader,
        variables=variables,
        slots={name: reader.aliases(levels[name].parameters.values()) for name in reads},
        buffers=reader.buffer_slots(),
        lower_buffers=reader.buffer_slots(below),
        tasks=_task_map(level, reader, [tasks[name] for name in reads if name in tasks]),
    )
    stepping = Stepping(
        level=level.name,
        where=level.loss.location,
        optimizer=problem.optimizer,
        parameters=tuple(level.parameters.values()),
        update=_update(level, levels),
        clip_norm=problem.clip_norm,
        learned=learned,
        tasks=problem.tasks is not None,
        restarts=problem.init is not None,
    )
    return Level(
        level.name,
        level.index,
        problem,
        tuple(level.parameters),
        variables[level.name],
        links,
        loss,
        stepping,
        level.response,
    )


def _task_map(level: Declared, reader: Reader, tasks: Sequence[Tasks]) -> TaskMap | None:
    if not tasks:
        return None
    convolves = any(isinstance(module, CONVOLUTIONS) for module in reader.modules())
    return TaskMap(level.name, level.loss.location, tasks, convolves=convolves)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _update(level: Declared, levels: Mapping[str, Declared]) -> FunctionUpdate | None:
    problem = level.problem
    if problem.update is None:
        return None
    modules = {name: levels[name].problem.module for name in level.update_reads}
    reader = Reader(problem.update, modules, takes_step=level.update_takes_step)
    slots = {name: reader.aliases(levels[name].parameters.values()) for name in level.update_reads}
    return FunctionUpdate(level.name, location(problem.update), reader, slots, problem.clip_norm)
