"""Calls a function of modules with other tensors in the modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nestor.autodiff.scope import Scope, Slot, in_scope, place
from nestor.autodiff.torch_private import tensor_slot
from nestor.vectors.algebra import Params


class Reader(nn.Module):
    """Holds the modules that a function reads, and calls the function with other tensors in them.

    The modules have prefixed names: a level may be called ``forward`` or ``module``.
    """

    def __init__(self, function: Callable[..., Any], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # In a tuple: a function that is itself a module must not become a part of the reader.
        self._function = (function,)
        # In a plain dict: torch registers them under the prefixed names.
        self._arguments = dict(modules)
        # Where the modules hold the tensors of a name, found at first use.
        self._slots: dict[str, Slot] = {}
        for name, module in modules.items():
            self.add_module(f"level_{name}", module)

    def call(self, arguments: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Call the function with other tensors in the place of named parameters and buffers.

        The tensors stay in the modules until the innermost :class:`~nestor.autodiff.scope.Scope` is left; without a
        scope, until the function returns. ``torch.func.functional_call`` looks the names up at every call, which takes
        a good part of the time of a small loss; this method looks them up once.
        """
        if not tensors:
            return self._function[0](*arguments, **self._arguments)
        placed = [(self._slot(name), tensor) for name, tensor in tensors.items()]
        if in_scope():
            place(placed)
            return self._function[0](*arguments, **self._arguments)
        with Scope():
            place(placed)
            return self._function[0](*arguments, **self._arguments)

    def _slot(self, name: str) -> Slot:
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = tensor_slot(self, name)
        return slot

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

    def buffer_slots(self, owners: Collection[nn.Module] | None = None) -> list[tuple[str, Slot]]:
        """List the buffers of all modules that are read, or of those among ``owners``, by name in the reader."""
        return [
            (name, self._slot(name))
            for prefix, module in self.named_modules()
            if owners is None or module in owners
            for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False)
            for name in (f"{prefix}.{attribute}",)
        ]


def replacements(replaced: Mapping[str, Params], slots: Mapping[str, Sequence[tuple[str, ...]]]) -> dict[str, Tensor]:
    """Name the tensors of some levels by the slots that they fill in a reader, tied ones several times."""
    named = {}
    for level, values in replaced.items():
        for value, names in zip(values, slots.get(level, ()), strict=False):
            for name in names:
                named[name] = value
    return named
