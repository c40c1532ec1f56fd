"""The check of options and arguments: the types that are annotated, then ranges."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, ForwardRef, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


def check_options(
    method: object, *, counts: Sequence[str] = (), tolerances: Sequence[str] = (), positive: Sequence[str] = ()
) -> None:
    """Check the options of a method: the types that a dataclass declares, then ranges. None is in every range.

    Scalars of other libraries and scalar tensors become numbers of Python.

    Args:
        method: The object whose fields are the options.
        counts: Names of the options that must be integers of at least 1.
        tolerances: Names of the options that must be finite and not negative.
        positive: Names of the options that must be finite and positive.

    Raises:
        TypeError: If an option is of another type than the dataclass declares.
        ValueError: If an option is out of range.
    """
    owner = type(method).__name__
    kind: Any = type(method)
    names = [option.name for option in fields(kind)] if is_dataclass(kind) else []
    hints = _hints(kind) if names else {}
    for name, value in _of_types(owner, hints, {name: getattr(method, name) for name in names}).items():
        object.__setattr__(method, name, value)
    ranges: list[tuple[Sequence[str], Callable[[Any], bool], str]] = [
        (counts, lambda n: is_integer(n) and 1 <= n <= sys.maxsize, "an integer of at least 1"),
        (tolerances, lambda value: _is_number(value) and 0 <= value < math.inf, "a finite number >= 0"),
        (positive, lambda value: _is_number(value) and 0 < value < math.inf, "positive and finite"),
    ]
    for chosen, is_valid, text in ranges:
        for name in chosen:
            value = getattr(method, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"{owner}({name}={_short(value)}) must be {text}.")
    given = {name: getattr(method, name) for name in names}
    _check_numbers(owner, hints, given)
    for name, value in given.items():
        if float in _members(hints.get(name, Any)) and isinstance(value, int | float) and not _is_number(value):
            raise ValueError(f"{owner}({name}={_short(value)}) must be a number that a float can hold.")


P = ParamSpec("P")
R = TypeVar("R")


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function or a constructor check that its arguments are of the annotated types.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is NaN, or no integer where one is asked.
    """
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__")
    single = {p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound, hints = signature.bind(*args, **kwargs), _hints(function)
        given = {name: value for name, value in bound.arguments.items() if name in single}
        given |= _of_types(owner, hints, given)
        _check_numbers(owner, hints, given)
        bound.arguments |= given
        return function(*bound.args, **bound.kwargs)

    return checked


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    try:
        return get_type_hints(annotated)
    except NameError:  # a class of the user's, with names that only a type checker knows
        return {}


def _of_types(owner: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the types of values; return those that are numbers of other libraries, as Python's."""
    converted = {}
    for name, value in values.items():
        kind = hints.get(name, Any)
        if _numeric(kind) and not isinstance(value, int | float) and (is_integer(value) or _is_number(value)):
            converted[name] = int(value) if is_integer(value) else float(value)
        elif not _fits(value, kind):
            is_class = isinstance(value, type) and any(issubclass(value, one) for one in _classes(kind))
            raise TypeError(
                f"{owner}({name}={_short(value)}) must be {_described(kind)}, got "
                f"{f'the class: {value.__name__}(...)' if is_class else type(value).__name__}."
            )
    return converted


def _check_numbers(owner: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        members = _members(hints.get(name, Any))
        if isinstance(value, bool) and bool not in members and _numeric(hints.get(name, Any)):
            raise ValueError(f"{owner}({name}={value}) must be a number, not a bool.")
        if isinstance(value, float) and int in members and float not in members:
            raise ValueError(f"{owner}({name}={value}) must be an integer.")


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated type; a number of the wrong sort is a matter of its range."""
    origin = get_origin(kind)
    if kind is Any or isinstance(kind, TypeVar | ForwardRef | str):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in get_args(kind))
    if origin is Literal:
        return isinstance(value, str)  # which one, the function says itself
    if kind in (int, float):
        return isinstance(value, int | float)
    if origin in (Sequence, Iterable) and isinstance(value, Tensor | str | bytes):
        return isinstance(value, Tensor) and value.dim() > 0
    return value is None if kind is None else isinstance(value, origin or kind)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of any library, and no flag."""
    if isinstance(value, Tensor):
        return not (value.dim() or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Return whether a value is a real number, neither a flag nor NaN, that a float can hold."""
    if isinstance(value, Tensor):
        return not (value.dim() or value.requires_grad or value.is_complex() or value.dtype == torch.bool)
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _numeric(kind: Any) -> bool:
    return int in _members(kind) or float in _members(kind)


def _classes(kind: Any) -> list[type]:
    return [one for member in _members(kind) if isinstance(one := get_origin(member) or member, type)]


_WORDS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
    Callable: "callable",
    Iterable: "an iterable",
    Sequence: "a sequence",
    Mapping: "a mapping",
}


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    members = [get_origin(member) or member for member in _members(kind)]
    return " or ".join(_WORDS.get(member) or f"an instance of {member.__name__}" for member in members)


def _short(value: Any) -> str:
    """Write a value in at most a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
