"""Conversion between nested structures of tensors and flat lists.

Public functions accept and return nested lists, tuples and dicts. The rest of the library uses flat lists of real
tensors: a complex tensor is flattened to its real and imaginary parts, along a new last dimension. Derivatives are then
those of a function of real numbers, as torch defines them, also where the function is not holomorphic.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="Tree")

Tree: TypeAlias = "Tensor | Sequence[Tree] | Mapping[str, Tree]"


def flatten(structure: Tree, name: str = "") -> list[Tensor]:
    """List the tensors of a nested structure, depth first; complex ones as real and imaginary parts.

    An error calls the structure ``name``.
    """
    return list(_leaves(structure, path=name))


def _leaves(structure: Tree, path: str) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield torch.view_as_real(structure.resolve_conj()) if structure.is_complex() else structure
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
        leaf = next(leaves)
        return torch.complex(leaf[..., 0], leaf[..., 1]) if structure.is_complex() else leaf
    if isinstance(structure, Mapping):
        return {key: _rebuild(part, leaves) for key, part in structure.items()}
    parts = [_rebuild(part, leaves) for part in structure]
    if isinstance(structure, tuple):
        # The constructor of a named tuple has one argument for each field.
        return type(structure)(*parts) if type(structure) is not tuple else tuple(parts)
    return parts
