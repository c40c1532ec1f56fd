"""The objects that data holds: a loader's samplers, its dataset, transforms, loaders inside of other iterables."""

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, GeneratorType, MethodType
from typing import Any

from torch import Tensor, nn

_DEPTH, _PARTS, _OBJECTS = 6, 100, 10_000
_CLOSED = (Tensor, nn.Module, str, bytes, int, float, complex, type, type(None))


def reachable(data: Any, *, closed: tuple[type, ...] = ()) -> Iterator[Any]:
    """Walk through what data holds, nearest first, each object once.

    The walk enters containers of at most 100 parts, attributes, what functions close over, arguments of partial
    functions, objects of bound methods, and local variables of generators. It ends at tensors, modules and objects of
    numpy, at a depth of 6, and after 10,000 objects.

    Args:
        data: Where the walk begins.
        closed: Classes whose instances are returned, but not entered.
    """
    seen: set[int] = set()
    waiting: deque[tuple[Any, int]] = deque([(data, 0)])
    while waiting and len(seen) < _OBJECTS:
        value, depth = waiting.popleft()
        if isinstance(value, _CLOSED) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if depth < _DEPTH and not isinstance(value, closed):
            waiting += ((part, depth + 1) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values() if len(value) <= _PARTS else ()
    if isinstance(value, list | tuple):
        return value if len(value) <= _PARTS else ()
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    if isinstance(value, GeneratorType):
        return inspect.getgeneratorlocals(value).values()
    if type(value).__module__.partition(".")[0] in ("builtins", "numpy"):
        return ()
    return getattr(value, "__dict__", {}).values()
