"""Calling a function of modules with other tensors in the place of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nestor.autodiff.torch_private import tensor_slot
from nestor.vectors.algebra import Params


class Reader(nn.Module):
    """Holds the modules that a function reads, and calls it with other tensors in the place of theirs.

    The modules stand under prefixed names: a level may be called ``forward`` or ``module``.
    """

    def __init__(self, function: Callable[..., Any], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # In a tuple: a function that is itself a module must not become a part of the reader.
        self._function = (function,)
        # In a plain dict: torch has them once already, under the prefixed names.
        self._arguments = dict(modules)
        # Where the tensors of a name are, found at first use.
        self._cells: dict[str, tuple[dict[str, Any], str]] = {}
        for name, module in modules.items():
            self.add_module(f"level_{name}", module)

    def forward(self, *arguments: Any) -> Any:
        """Call the function."""
        return self._function[0](*arguments, **self._arguments)

    def call(self, arguments: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Call the function with other tensors in the place of named parameters and buffers.

        What ``torch.func.functional_call`` does, with the look-up of the names done once: it is a good part of the
        time of a small loss.
        """
        function = self._function[0]
        if not tensors:
            return function(*arguments, **self._arguments)
        held: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, tensor in tensors.items():
                slots, key = self._cells.get(name) or self._find(name)
                held.append((slots, key, slots[key]))
                slots[key] = tensor
            return function(*arguments, **self._arguments)
        finally:
            for slots, key, before in reversed(held):
                slots[key] = before

    def _find(self, name: str) -> tuple[dict[str, Any], str]:
        self._cells[name] = cell = tensor_slot(self, name)
        return cell

    def aliases(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, ...]]:
        """List the names of each parameter within the reader; none if no module that is read holds it.

        A parameter that several modules hold (tied weights) has a name in each. A module that is reachable in several
        ways is named once: to replace the same slot twice is to lose what it held.
        """
        names: dict[int, list[str]] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        return [tuple(names.get(id(parameter), ())) for parameter in parameters]

    def buffer_slots(self) -> list[tuple[str, nn.Module, str]]:
        """List the buffers of all modules that are read, as (name in the reader, owner, attribute)."""
        return [
            (f"{prefix}.{attribute}", module, attribute)
            for prefix, module in self.named_modules()
            for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False)
        ]


def replacements(replaced: Mapping[str, Params], slots: Mapping[str, Sequence[tuple[str, ...]]]) -> dict[str, Tensor]:
    """Name the tensors of some levels by the slots that they fill in a reader, tied ones several times."""
    named = {}
    for level, values in replaced.items():
        for value, names in zip(values, slots.get(level, ()), strict=False):
            for name in names:
                named[name] = value
    return named
