"""What all processes of a run must have in common, in words that can be compared."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from nestor.data.zipped import loaders_of
from nestor.distributed import Runtime
from nestor.levels.level import Level
from nestor.training.callback import Callback
from nestor.training.description import describe


def compare_programs(
    runtime: Runtime, levels: Mapping[str, Level], nesting: str, callbacks: Sequence[Callback], **options: Any
) -> None:
    """Check that all processes build the same engine; callbacks with ``only_first`` may differ.

    Args:
        runtime: The runtime.
        levels: The levels of the program.
        nesting: How their best responses are composed.
        callbacks: The callbacks.
        **options: Options of the engine.

    Raises:
        ProcessError: If a process differs or does not arrive; it names the process and the difference.
    """
    if runtime.size == 1:
        return
    tree = describe(levels, nesting, [callback for callback in callbacks if not callback.only_first], **options)
    data = {name: {"rows": _rows(level.problem.data)} for name, level in levels.items()}
    parts = (tree["structure"], {"levels": data}, tree["settings"])
    own = {"levels": ", ".join(levels)} | {name: text for part in parts for name, text in _flat(part)}
    runtime.compare("Engine(...)", own)


def _flat(tree: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings, each with the names on the way to it."""
    if not isinstance(tree, Mapping):
        yield place, str(tree)
        return
    for name, part in tree.items():
        if not place and name == "levels":
            for level, own in part.items():
                yield from _flat(own, f"level {level!r}")
        else:
            yield from _flat(part, f"{place}, {name}" if place else name)


def _rows(data: Any) -> str:
    """Describe data by class and length, as far as they tell it."""
    if isinstance(data, DataLoader):
        return f"{type(data).__name__} of {_length(data.dataset)} rows in batches of {data.batch_size}"
    if (loaders := loaders_of(data)) is not None:
        return " and ".join(map(_rows, loaders))
    return f"{type(data).__name__} of length {_length(data)}"


def _length(data: Any) -> str:
    try:
        return str(len(data))
    except (TypeError, NotImplementedError):
        return "unknown"
