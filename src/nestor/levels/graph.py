"""The graph of a program, read from the signatures of its losses and validated."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nestor.levels.function_update import FunctionUpdate
from nestor.levels.level import Level
from nestor.levels.reader import Reader
from nestor.optim.functional_step import check_differentiable
from nestor.problem import Problem
from nestor.responses import T1T2


@dataclass
class _Draft:
    """A level on its way to validation."""

    name: str
    index: int
    problem: Problem
    where: str
    takes_batch: bool = False
    arguments: tuple[str, ...] = ()
    parameters: tuple[nn.Parameter, ...] = ()
    variables: tuple[nn.Parameter, ...] = ()
    names: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    update_arguments: tuple[str, ...] = ()
    learned: dict[tuple[int, str], tuple[str, int]] = field(default_factory=dict)
    depends: tuple[str, ...] = ()
    start: tuple[int, ...] = ()
    lowers: tuple[str, ...] = ()
    uppers: tuple[str, ...] = ()
    connected: set[str] = field(default_factory=set)


def build(problems: Mapping[str, Problem]) -> dict[str, Level]:
    """Read and validate the graph; the levels by name, lowest first.

    Raises:
        TypeError: If a value is no :class:`Problem`.
        ValueError: If the program is not well formed; the message names level, loss, cause and remedy.
    """
    if not problems:
        raise ValueError("Program() has no level. Write Program(name=nestor.Problem(...), ...), lowest level first.")
    for name, problem in problems.items():
        if not isinstance(problem, Problem):
            raise TypeError(f"Level {name!r} must be a nestor.Problem, got {type(problem).__name__}.")
    drafts = {
        name: _Draft(name, index, problem, location(problem.loss))
        for index, (name, problem) in enumerate(problems.items())
    }
    for draft in drafts.values():
        _read_signature(draft, drafts)
        _choose_variables(draft)
        _read_update(draft, drafts)
    _check_disjoint(drafts.values())
    _find_reads(drafts)
    _check_tasks(drafts)
    _order(drafts)
    _check_gradients(drafts)
    return {name: _finish(draft, drafts) for name, draft in drafts.items()}


def location(loss: Callable[..., Any]) -> str:
    """Say where a callable is defined, as ``name (file:line)``."""
    function: Any = _function(loss)
    while isinstance(function, functools.partial):
        function = _function(function.func)
    function = inspect.unwrap(function)
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        function = inspect.unwrap(type(function).__call__)
    name = getattr(function, "__qualname__", repr(function))
    try:
        code = function.__code__
    except AttributeError:
        return str(name)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _function(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return what states the arguments: calling a module calls its ``forward``."""
    return loss.forward if isinstance(loss, nn.Module) else loss


def _fail(draft: _Draft, message: str) -> ValueError:
    return ValueError(f"Level {draft.name!r}, loss {draft.where}: {message}")


def _read_signature(draft: _Draft, drafts: Mapping[str, _Draft]) -> None:
    levels = ", ".join(repr(name) for name in drafts)
    try:
        signature = inspect.signature(_function(draft.problem.loss))
    except (TypeError, ValueError) as error:
        wrap = f"Wrap it: lambda batch, {draft.name}: ..."
        raise _fail(draft, f"its signature cannot be read ({error}). {wrap}") from None
    parameters = list(signature.parameters.values())
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise _fail(
                draft,
                f"the argument {stars}{parameter.name} does not say which levels are read. Name them: the arguments "
                f"after the batch are names of levels ({levels}).",
            )
    first = parameters[0] if parameters else None
    has_data = draft.problem.data is not None
    if has_data and (first is None or first.name in drafts):
        found = "takes no argument" if first is None else f"has {first.name!r}, a level, as its first argument"
        raise _fail(
            draft,
            f"the level has data, so the first argument is the batch, but the loss {found}. Write "
            f"def loss(batch, {', '.join(p.name for p in parameters) or draft.name}), or leave out data.",
        )
    # A program without an engine may leave the data out and hand over batches itself.
    draft.takes_batch = has_data or (first is not None and first.name not in drafts and not _is_option(first))
    if draft.takes_batch and first is not None:
        if first.kind is first.KEYWORD_ONLY:
            raise _fail(draft, f"the batch is handed over by position, but {first.name!r} is keyword-only.")
        close = difflib.get_close_matches(first.name, drafts, 1, 0.75)
        if close and not has_data:
            raise _fail(draft, f"{first.name!r} is the name of no level ({levels}); did you mean {close[0]!r}?")
    arguments = []
    for parameter in parameters[1:] if draft.takes_batch else parameters:
        if parameter.name in drafts:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise _fail(draft, f"levels are handed over by name, but {parameter.name!r} is positional-only.")
            arguments.append(parameter.name)
        elif not _is_option(parameter):
            close = difflib.get_close_matches(parameter.name, drafts, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            first_hint = "" if draft.takes_batch else " A batch is handed over only to a level with data."
            raise _fail(
                draft,
                f"the argument {parameter.name!r} is the name of no level (the levels are {levels}).{hint}{first_hint} "
                "Bind anything else beforehand, with functools.partial or a default value.",
            )
    draft.arguments = tuple(arguments)


def _is_option(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def _choose_variables(draft: _Draft) -> None:
    problem = draft.problem
    named = {id(p): (name, p) for name, p in problem.module.named_parameters()}
    held = [p for group in problem.optimizer.param_groups for p in group["params"]] if problem.optimizer else []
    if held and not any(id(p) in named for p in held):
        raise _fail(
            draft,
            "the optimizer holds none of the module's parameters. Make it from the same module: "
            "SGD(module.parameters(), ...), after any call that replaces parameters.",
        )
    if problem.variables is not None:
        chosen = list(problem.variables)
        for p in chosen:
            if id(p) not in named:
                raise _fail(draft, f"variables holds a tensor of shape {tuple(p.shape)} that the module does not hold.")
            if not p.requires_grad:
                raise _fail(draft, f"the variable {named[id(p)][0]!r} does not require a gradient: requires_grad_().")
            if held and not any(q is p for q in held):
                raise _fail(draft, f"the variable {named[id(p)][0]!r} is not in the optimizer, so it would never move.")
    elif held:
        chosen = [p for p in held if p.requires_grad and id(p) in named]
    else:
        chosen = [p for _, p in named.values() if p.requires_grad]
    if not chosen:
        raise _fail(draft, "the level has no variable: no parameter of its module requires a gradient.")
    wanted = {id(p) for p in chosen}
    draft.names, draft.parameters = zip(*(named[i] for i in named if i in wanted), strict=True)
    draft.variables = draft.parameters
    if problem.tasks is not None:
        draft.variables = tuple(nn.Parameter(torch.stack([p.detach()] * problem.tasks)) for p in draft.parameters)


def _check_disjoint(drafts: Iterable[_Draft]) -> None:
    owner: dict[int, _Draft] = {}
    for draft in drafts:
        for name, parameter in zip(draft.names, draft.parameters, strict=True):
            other = owner.setdefault(id(parameter), draft)
            if other is not draft:
                raise _fail(
                    draft,
                    f"its variable {name!r} is a variable of level {other.name!r} too. Give both levels "
                    "disjoint variables=...",
                )


def _read_update(draft: _Draft, drafts: Mapping[str, _Draft]) -> None:
    """Find the levels that a user-written update rule reads, and the level that the variables start from."""
    problem = draft.problem
    levels = ", ".join(repr(name) for name in drafts)
    if problem.update is not None:
        where = location(problem.update)
        parameters = list(inspect.signature(_function(problem.update)).parameters.values())
        if len(parameters) < 3 or any(p.name in drafts for p in parameters[:3]):
            raise _fail(draft, f"its update {where} must take (params, grads, state), then names of levels ({levels}).")
        found = []
        for parameter in parameters[3:]:
            if parameter.name in drafts and drafts[parameter.name].index > draft.index:
                found.append(parameter.name)
            elif not _is_option(parameter):
                raise _fail(
                    draft,
                    f"its update {where} has the argument {parameter.name!r}, which is the name of no level above it "
                    f"(the levels are {levels}, lowest first). Bind anything else with functools.partial.",
                )
        draft.update_arguments = tuple(found)
    if problem.init is not None and (problem.init not in drafts or drafts[problem.init].index <= draft.index):
        raise _fail(draft, f"init={problem.init!r} is not the name of a level above it (the levels are {levels}).")
    if problem.response is not None and problem.response.recording is not None and problem.optimizer is not None:
        try:
            check_differentiable(problem.optimizer)
        except TypeError as error:
            raise _fail(draft, f"{problem.response.describe()} differentiates its optimizer, but {error}") from None


def _find_learned(draft: _Draft, drafts: Mapping[str, _Draft]) -> None:
    """Find hyperparameters of the optimizer that are variables of other levels: learned learning rates."""
    owner = {
        id(p): (other.name, place)
        for other in drafts.values()
        for place, p in enumerate(other.parameters)
        if other is not draft
    }
    for index, group in enumerate(draft.problem.optimizer.param_groups if draft.problem.optimizer else ()):
        for key, value in group.items():
            if key == "params" or not isinstance(value, Tensor) or not value.requires_grad:
                continue
            if id(value) not in owner or drafts[owner[id(value)][0]].index < draft.index:
                raise _fail(
                    draft,
                    f"the optimizer's {key!r} requires a gradient but is no variable of a level above. Learn it in a "
                    f"level of its own, listed later: Problem(Variable(...), ...), and pass that Variable's .value.",
                )
            draft.learned[index, key] = owner[id(value)]


def _find_reads(drafts: Mapping[str, _Draft]) -> None:
    owner = {id(p): draft.name for draft in drafts.values() for p in draft.parameters}
    for draft in drafts.values():
        found = set(draft.arguments)
        # A module may hold variables of another level, as a supernet holds weights and architecture.
        for argument in draft.arguments:
            found |= {owner[id(p)] for p in drafts[argument].problem.module.parameters() if id(p) in owner}
        # A level that is named by an argument but whose variables lie elsewhere is still read.
        draft.reads = tuple(name for name in drafts if name in found)
        _find_learned(draft, drafts)
        found |= {*draft.update_arguments, *(level for level, _ in draft.learned.values())}
        if draft.problem.init is not None:
            found.add(draft.problem.init)
            draft.start = _find_start(draft, drafts[draft.problem.init])
        draft.depends = tuple(name for name in drafts if name in found)
        for name in draft.depends:
            if name != draft.name:
                draft.connected.add(name)
                drafts[name].connected.add(draft.name)
    if len(drafts) > 1:
        for draft in drafts.values():
            if not draft.connected:
                raise _fail(
                    draft,
                    f"nothing connects the level: it reads {_listing(draft.reads)} and no other level reads it. Name "
                    "the levels it depends on as arguments of its loss, or leave it out.",
                )


def _check_tasks(drafts: Mapping[str, _Draft]) -> None:
    for draft in drafts.values():
        counts = {name: drafts[name].problem.tasks for name in draft.reads if drafts[name].problem.tasks is not None}
        if len(set(counts.values())) > 1:
            raise _fail(draft, f"it reads levels with different numbers of tasks: {counts}.")


def _find_start(draft: _Draft, origin: _Draft) -> tuple[int, ...]:
    """Match the variables of a level with those that they start from: by name, or else by position."""
    place = {name: index for index, name in enumerate(origin.names)}
    named = all(name in place for name in draft.names)
    found = tuple(place[name] for name in draft.names) if named else tuple(range(len(origin.names)))
    here = {name: tuple(p.shape) for name, p in zip(draft.names, draft.parameters, strict=True)}
    there = [tuple(origin.parameters[index].shape) for index in found]
    if list(here.values()) != there:
        raise _fail(
            draft,
            f"init={origin.name!r} cannot start it: its variables are {here}, those of {origin.name!r} "
            f"{ {name: tuple(p.shape) for name, p in zip(origin.names, origin.parameters, strict=True)} }. Make one "
            "module a copy of the other: copy.deepcopy(module).",
        )
    return found


def _order(drafts: Mapping[str, _Draft]) -> None:
    order = list(drafts)
    for draft in drafts.values():  # lowest first: the uppers of every level below are known
        lowers = {name for name in draft.depends if drafts[name].index < draft.index}
        # A level that a lower responds to, and that is below this one, responds as well.
        while True:
            more = {u for name in lowers for u in drafts[name].uppers if drafts[u].index < draft.index} - lowers
            if not more:
                break
            lowers |= more
        uppers = {name for name in draft.depends if drafts[name].index > draft.index}
        uppers |= {u for name in lowers for u in drafts[name].uppers if drafts[u].index > draft.index}
        draft.lowers = tuple(name for name in order if name in lowers)
        draft.uppers = tuple(name for name in order if name in uppers)


def _check_gradients(drafts: Mapping[str, _Draft]) -> None:
    for draft in drafts.values():
        if draft.name in draft.reads:
            continue
        responding = [name for name in draft.lowers if draft.name in drafts[name].uppers]
        if any(
            (drafts[name].problem.response or T1T2()).differentiable or drafts[name].problem.init == draft.name
            for name in responding
        ):
            continue
        reads = _listing([name for name in draft.reads if name != draft.name])
        if responding:
            raise _fail(
                draft,
                f"the level gets no gradient: its loss does not read {draft.name!r}, and the response of "
                f"{_listing(responding)} lets nothing through. Give that level a response such as T1T2().",
            )
        later = [name for name in draft.reads if drafts[name].index > draft.index]
        if later:
            raise _fail(
                draft,
                f"the level gets no gradient: its loss reads {reads} and not {draft.name!r}. Levels are listed lowest "
                f"first; if {draft.name!r} is above {later[0]!r}, list {later[0]!r} before it: "
                f"Program({', '.join(f'{name}=...' for name in reversed(list(drafts)))}).",
            )
        raise _fail(
            draft,
            f"the level gets no gradient: its loss reads {reads}, and no level below it depends on {draft.name!r}. "
            f"Let this loss or the loss of a level below read {draft.name!r} (name it as an argument).",
        )


def _listing(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no level"


def _finish(draft: _Draft, drafts: Mapping[str, _Draft]) -> Level:
    reader = Reader(draft.problem.loss, {name: drafts[name].problem.module for name in draft.arguments})
    buffers = reader.buffer_slots()
    below = {id(module) for name in draft.lowers for module in drafts[name].problem.module.modules()}
    return Level(
        name=draft.name,
        index=draft.index,
        problem=draft.problem,
        where=draft.where,
        takes_batch=draft.takes_batch,
        arguments=draft.arguments,
        reads=draft.reads,
        depends=draft.depends,
        update=_update(draft, drafts),
        learned=draft.learned,
        start=draft.start,
        lowers=draft.lowers,
        uppers=draft.uppers,
        parameters=draft.variables,
        members=draft.parameters,
        mapped={name: n for name in draft.reads if (n := drafts[name].problem.tasks) is not None},
        names=draft.names,
        response=draft.problem.response or T1T2(),
        placements=None,
        precision=None,
        reader=reader,
        slots={name: reader.aliases(drafts[name].parameters) for name in draft.reads},
        constants={name: drafts[name].variables for name in draft.reads},
        all_buffers=buffers,
        lower_buffers=[slot for slot in buffers if id(slot[1]) in below],
    )


def _update(draft: _Draft, drafts: Mapping[str, _Draft]) -> FunctionUpdate | None:
    if draft.problem.update is None:
        return None
    reader = Reader(draft.problem.update, {name: drafts[name].problem.module for name in draft.update_arguments})
    slots = {name: reader.aliases(drafts[name].parameters) for name in draft.update_arguments}
    return FunctionUpdate(draft.name, location(draft.problem.update), reader, slots, draft.problem.clip_norm)
