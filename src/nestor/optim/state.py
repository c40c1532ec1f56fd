"""What an optimizer step reads and changes."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.vectors.algebra import Params

Stored: TypeAlias = "Callable[[], State]"
"""A state that is kept somewhere; calling it brings the state back."""

OffloadTo: TypeAlias = "torch.device | str | os.PathLike[str] | None"
"""Where states are kept: as they are (None), on a device, or in a folder."""

# Counters of steps, which are numbers to torch's optimizers though they are kept as tensors.
_COUNTERS = ("step",)


@dataclass(frozen=True)
class State:
    """The variables of a level and its optimizer's memory, before or after a step.

    Attributes:
        params: The variables.
        slots: What the optimizer keeps, one mapping for each variable (momentum, counters).
    """

    params: Sequence[Tensor]
    slots: Sequence[Mapping[str, Any]]

    def tensors(self) -> list[Tensor]:
        """List what a derivative can run through: the variables, then the slots."""
        return [*self.params, *(slot[key] for slot in self.slots for key in _differentiable(slot))]

    def replace(self, tensors: Params) -> State:
        """Put other tensors in the places that :meth:`tensors` lists."""
        values = iter(tensors)
        params = [next(values) for _ in self.params]
        slots = [{**slot, **{key: next(values) for key in _differentiable(slot)}} for slot in self.slots]
        return State(params, slots)

    def to(self, device: torch.device) -> State:
        """Copy to a device; tensors that are there already are shared."""
        return State(
            [p.to(device) for p in self.params],
            [{k: v.to(device) if isinstance(v, Tensor) and v.dim() else v for k, v in s.items()} for s in self.slots],
        )


def _differentiable(slot: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key, value in slot.items()
        if isinstance(value, Tensor) and value.is_floating_point() and key not in _COUNTERS
    ]


def keep(state: State, offload_to: OffloadTo = None) -> Stored:
    """Keep a state: in memory as it is (None), on a device, or in a file of a folder.

    The file is deleted when the state is no longer referred to.
    """
    if offload_to is None:
        return lambda: state
    home = state.params[0].device
    if isinstance(offload_to, os.PathLike):
        return _keep_on_disk(state, Path(offload_to), home)
    away = state.to(torch.device(offload_to))
    return lambda: away.to(home)


class _File:
    """A file that lives as long as this object."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".pt", prefix="state-", dir=folder)
        os.close(handle)
        self.name = name
        weakref.finalize(self, partial(Path(name).unlink, missing_ok=True))


def _keep_on_disk(state: State, folder: Path, home: torch.device) -> Stored:
    file = _File(folder)
    torch.save({"params": list(state.params), "slots": [dict(slot) for slot in state.slots]}, file.name)

    def load() -> State:
        saved = torch.load(file.name, map_location=home)
        return State(saved["params"], saved["slots"])

    return load
