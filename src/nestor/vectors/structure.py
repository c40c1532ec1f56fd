"""Conversion between nested structures of tensors and flat lists.

Public functions accept and return nested lists, tuples and dicts. The rest of the library uses flat lists.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T", bound="Tree")

Tree: TypeAlias = "Tensor | Sequence[Tree] | Mapping[str, Tree]"


def flatten(structure: Tree, name: str = "") -> list[Tensor]:
    """List the tensors of a nested structure, depth first; an error calls the structure ``name``."""
    return list(_leaves(structure, path=name))


def _leaves(structure: Tree, path: str) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        for key, part in structure.items():
            yield from _leaves(part, f"{path}[{key!r}]")
    elif isinstance(structure, Sequence) and not isinstance(structure, str):
        for index, part in enumerate(structure):
            yield from _leaves(part, f"{path}[{index}]")
    else:
        raise TypeError(
            f"Expected a Tensor or a nested list, tuple or dict of Tensors, got {type(structure).__name__}"
            f"{f' at {path}' if path else ''}. Convert it with torch.as_tensor first."
        )


def unflatten(structure: T, leaves: Iterable[Tensor]) -> T:
    """Build a structure of the shape of ``structure`` from ``leaves``."""
    built: T = _rebuild(structure, iter(leaves))
    return built


def _rebuild(structure: Any, leaves: Iterator[Tensor]) -> Any:
    if isinstance(structure, Tensor):
        return next(leaves)
    if isinstance(structure, Mapping):
        return {key: _rebuild(part, leaves) for key, part in structure.items()}
    parts = [_rebuild(part, leaves) for part in structure]
    if isinstance(structure, tuple):
        # The constructor of a named tuple has one argument for each field.
        return type(structure)(*parts) if type(structure) is not tuple else tuple(parts)
    return parts
