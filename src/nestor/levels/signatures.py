"""Determines from the argument names of a loss, an update rule or a validation which levels it reads."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import nn

from nestor.problem import Problem


@dataclass(frozen=True)
class Signature:
    """The arguments of a level's loss.

    Attributes:
        level: Name of the level.
        location: Where the loss is defined, as ``name (file:line)``.
        takes_batch: Whether the first argument is a batch, passed by position.
        arguments: Maps the arguments that are levels to the levels. Each receives the module of its level, by keyword.
        takes_step: Whether it has the argument ``step``, which receives the number of steps taken, by keyword.
    """

    level: str
    location: str
    takes_batch: bool
    arguments: Mapping[str, str]
    takes_step: bool = False

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that are arguments, each once."""
        return tuple(dict.fromkeys(self.arguments.values()))

    def error(self, message: str) -> ValueError:
        """Return the error of a program that is not well formed: level and loss, then the message."""
        return ValueError(f"Level {self.level!r}, loss {self.location}: {message}")


def read_loss(name: str, problem: Problem, names: Collection[str]) -> Signature:
    """Read the signature of a level's loss.

    ``Problem(reads=...)`` gives levels to arguments with other names. A program that is never run by an engine may
    leave out ``data`` and pass batches itself. The first argument is then a batch if it is no level and has no default
    value.

    Args:
        name: The level.
        problem: Its declaration.
        names: All levels of the program, lowest first.

    Raises:
        ValueError: If the loss has no batch argument though the level has data, an argument names no level, or
            ``reads`` names an argument that the loss does not have, or no level.
    """
    where = location(problem.loss)
    subject = f"Level {name!r}, loss {where}"
    parameters, takes_step = _without_step(problem.loss, read_parameters(problem.loss, names, subject), subject)
    reads = dict(problem.reads or {})
    _check_reads(reads, parameters, names, subject)
    known = dict(zip(names, names, strict=True)) | reads
    first = parameters[0] if parameters else None
    has_data = problem.data is not None
    if has_data and (first is None or first.name in known):
        found = "takes no argument" if first is None else f"has {first.name!r}, a level, as its first argument"
        raise ValueError(
            f"{subject}: the level has data, so the first argument is the batch, but the loss {found}. Write "
            f"def loss(batch, {', '.join(p.name for p in parameters) or name}), or leave out data."
        )
    takes_batch = has_data or (first is not None and first.name not in known and not _has_default(first))
    if takes_batch and first is not None:
        if first.kind is Parameter.KEYWORD_ONLY:
            raise ValueError(f"{subject}: the batch is passed by position, but {first.name!r} is keyword-only.")
        close = difflib.get_close_matches(first.name, names, 1, 0.75)
        if close and not has_data:
            raise ValueError(
                f"{subject}: {first.name!r} is the name of no level ({_listing(names)}); did you mean {close[0]!r}?"
            )
    hint = "" if takes_batch else " Only a level with data receives a batch."
    arguments = level_arguments(parameters[takes_batch:], names, subject, hint=hint, reads=reads)
    return Signature(name, where, takes_batch, {argument: known[argument] for argument in arguments}, takes_step)


def _check_reads(
    reads: Mapping[str, str], parameters: Sequence[Parameter], names: Collection[str], subject: str
) -> None:
    for argument, level in reads.items():
        given = f"reads={{{argument!r}: {level!r}}}"
        if argument not in (parameter.name for parameter in parameters):
            arguments = _listing([parameter.name for parameter in parameters])
            raise ValueError(f"{subject}: {given}, but the loss has no argument {argument!r}; it has {arguments}.")
        if level not in names:
            raise ValueError(f"{subject}: {given}, but {level!r} is the name of no level ({_listing(names)}).")


def read_update(name: str, problem: Problem, names: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """List the levels that an update rule reads: its arguments after ``(params, grads, state)``.

    The second result is whether it has the argument ``step``.

    Args:
        name: The level that the rule steps.
        problem: Its declaration.
        names: All levels of the program, lowest first. An update rule may read the levels above its own.

    Raises:
        ValueError: If the first three arguments are not ``(params, grads, state)``, or another names no level above.
    """
    if problem.update is None:
        return (), False
    subject = f"Level {name!r}, update {location(problem.update)}"
    parameters, takes_step = _without_step(problem.update, read_parameters(problem.update, names, subject), subject)
    if len(parameters) < 3 or any(p.name in names for p in parameters[:3]):
        raise ValueError(
            f"{subject}: an update must take (params, grads, state), then names of levels ({_listing(names)})."
        )
    above = names[names.index(name) + 1 :]
    return level_arguments(parameters[3:], above, subject, kind=f"level above {name!r}"), takes_step


STEP = "step"
"""The argument of a loss or an update rule that receives the number of optimizer steps the level has taken."""


def _without_step(
    function: Callable[..., Any], parameters: Sequence[Parameter], subject: str
) -> tuple[list[Parameter], bool]:
    """Remove the argument ``step``, and return whether there is one that a partial has not bound."""
    found = next((parameter for parameter in parameters if parameter.name == STEP), None)
    if found is None or _binds_step(function):
        return list(parameters), False
    if found.kind is Parameter.POSITIONAL_ONLY:
        raise ValueError(f"{subject}: the number of steps is passed by name, but {STEP!r} is positional-only.")
    return [parameter for parameter in parameters if parameter is not found], True


def _binds_step(function: Callable[..., Any]) -> bool:
    if not isinstance(function, functools.partial):
        return False
    return STEP in function.keywords or _binds_step(function.func)


def read_parameters(function: Callable[..., Any], names: Collection[str], subject: str) -> list[Parameter]:
    """List the arguments of a function, bound method, partial, callable object, or module.

    Raises:
        ValueError: If the signature cannot be read, or has arguments without a name (``*`` or ``**``).
    """
    try:
        parameters = list(inspect.signature(_with_named_arguments(function)).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{subject}: its signature cannot be read ({error}). Wrap it in a function that names its arguments, such "
            f"as lambda batch, {next(iter(names), 'level')}: ..."
        ) from None
    for parameter in parameters:
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is Parameter.VAR_POSITIONAL else "**"
            raise ValueError(
                f"{subject}: the argument {stars}{parameter.name} does not say which levels are read. Write one "
                f"argument for each level that is read ({_listing(names)})."
            )
    return parameters


def level_arguments(
    parameters: Sequence[Parameter],
    names: Collection[str],
    subject: str,
    *,
    kind: str = "level",
    hint: str = "",
    reads: Collection[str] = (),
) -> tuple[str, ...]:
    """List the arguments that are names of levels or in ``reads``; every other argument must have a default value.

    Args:
        parameters: The arguments that are passed by keyword.
        names: The levels that may be named.
        subject: The function with these arguments, the beginning of an error.
        kind: A word for the levels in ``names``, for the error.
        hint: A sentence to add to the error.
        reads: The arguments that receive levels of other names.

    Raises:
        ValueError: If an argument without a default value names no level, or one that names a level is positional-only.
    """
    found = []
    for parameter in parameters:
        if parameter.name in names or parameter.name in reads:
            if parameter.kind is Parameter.POSITIONAL_ONLY:
                raise ValueError(f"{subject}: levels are passed by name, but {parameter.name!r} is positional-only.")
            found.append(parameter.name)
        elif not _has_default(parameter):
            close = difflib.get_close_matches(parameter.name, names, 1)
            suggestion = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{subject}: the argument {parameter.name!r} is the name of no {kind} (the levels are "
                f"{_listing(names)}).{suggestion}{hint} Bind anything else beforehand, with functools.partial or a "
                "default value."
            )
    return tuple(found)


def location(function: Callable[..., Any]) -> str:
    """Return where a callable is defined, as ``name (file:line)``."""
    found: Any = _with_named_arguments(function)
    while isinstance(found, functools.partial):
        found = found.func
    found = inspect.unwrap(found)
    if not (inspect.isfunction(found) or inspect.ismethod(found)):
        found = inspect.unwrap(type(found).__call__)
    name = getattr(found, "__qualname__", repr(found))
    try:
        code = found.__code__
    except AttributeError:
        return str(name)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _with_named_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` for a module: the signature of ``nn.Module.__call__`` is ``(*args, **kwargs)``."""
    if isinstance(function, nn.Module):
        return function.forward
    if isinstance(function, functools.partial):
        return functools.partial(_with_named_arguments(function.func), *function.args, **function.keywords)
    return function


def _has_default(parameter: Parameter) -> bool:
    return parameter.default is not Parameter.empty


def _listing(names: Collection[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
