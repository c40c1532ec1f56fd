"""The state of a level between steps, and where it is stored."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from nestor.optim.offload import offloaded
from nestor.vectors import Params

Stored: TypeAlias = "Callable[[], State]"
"""A stored state; calling it returns the state."""

OffloadTo: TypeAlias = torch.device | str | os.PathLike[str] | None
"""Where states are stored: in place (None), on a device, or in a folder."""

# Step counters: tensors in the state of torch's optimizers, but nothing is differentiated with respect to them.
_COUNTERS = ("step",)


@dataclass(frozen=True)
class State:
    """The variables of a level and its optimizer's memory, before or after a step.

    Attributes:
        params: The variables.
        slots: The optimizer's memory (momentum, counters), one mapping for each variable.
    """

    params: Sequence[Tensor]
    slots: Sequence[Mapping[str, Any]]

    def tensors(self) -> list[Tensor]:
        """List the differentiable tensors: the variables, then those of the slots."""
        return [*self.params, *(slot[key] for slot in self.slots for key in memory_keys(slot))]

    def replace(self, tensors: Params) -> Self:
        """Return the state with other tensors in place of those that :meth:`tensors` lists."""
        values = iter(tensors)
        params = [next(values) for _ in self.params]
        slots = [{**slot, **{key: next(values) for key in memory_keys(slot)}} for slot in self.slots]
        return type(self)(params, slots)

    def cotangents(self, values: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[dict[str, Tensor]]]:
        """Split cotangents on the first of :meth:`tensors` into those on the variables and those on the memory."""
        own, rest = list(values[: len(self.params)]), iter(values[len(self.params) :])
        slots = [{key: next(rest, None) for key in memory_keys(slot)} for slot in self.slots]
        return own, [{key: value for key, value in slot.items() if value is not None} for slot in slots]

    def list_cotangents(
        self, params: Sequence[Tensor | None], slots: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor | None]:
        """List cotangents in the order of :meth:`tensors`; None for a tensor of the memory that has none."""
        keys = map(memory_keys, self.slots)
        return [*params, *(given.get(key) for given, names in zip(slots, keys, strict=True) for key in names)]

    def to(self, device: torch.device) -> Self:
        """Copy the state to a device; tensors that are already on the device are shared."""
        return type(self)(
            [p.to(device) for p in self.params],
            [{k: v.to(device) if isinstance(v, Tensor) and v.dim() else v for k, v in s.items()} for s in self.slots],
        )


def memory_keys(slot: Mapping[str, Any]) -> list[str]:
    """List the keys of the differentiable tensors in the optimizer's memory of one variable."""
    # Sorted: a step of torch, a step in closed form and a compiled one may enter the same keys in different orders.
    return sorted(
        (
            key
            for key, value in slot.items()
            if isinstance(value, Tensor) and value.is_floating_point() and key not in _COUNTERS
        ),
        key=str,
    )


def keep(state: State, offload_to: OffloadTo = None) -> Stored:
    """Store a state: in place (None), on a device, or in a file in a folder.

    The file is deleted when no reference to the stored state is left.
    """
    if offload_to is None:
        return lambda: state
    home = state.params[0].device
    if isinstance(offload_to, os.PathLike):
        data = {"params": list(state.params), "slots": [dict(slot) for slot in state.slots]}
        read = offloaded(data, Path(offload_to), home)
        return lambda: State(**read())
    away = state.to(torch.device(offload_to))
    return lambda: away.to(home)
