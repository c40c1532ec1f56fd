"""How a response prints: as the expression that makes it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

R = TypeVar("R")


def is_default(method: Any, name: str) -> bool:
    """Return whether a field of a dataclass has its default."""
    option = next(option for option in fields(method) if option.name == name)
    default = option.default if option.default_factory is MISSING else option.default_factory()
    return bool(getattr(method, name) == default)


def show(value: Any) -> str:
    """Write a value; a dataclass without its defaults."""
    return brief(value) if is_dataclass(value) else repr(value)


def brief(method: Any) -> str:
    """Write a dataclass with the fields that differ from their defaults."""
    names = [option.name for option in fields(method) if option.repr and not is_default(method, option.name)]
    return f"{type(method).__name__}({', '.join(f'{name}={show(getattr(method, name))}' for name in names)})"


def named(response: R, function: Callable[..., R], options: Mapping[str, Any]) -> R:
    """Let a response print as the call of ``function`` that makes it, with the options that are not the defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    given = [f"{name}={show(value)}" for name, value in options.items() if value != defaults[name]]
    object.__setattr__(response, "expression", f"{function.__name__}({', '.join(given)})")
    return response
