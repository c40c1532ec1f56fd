"""The constants of a loss: tensors that it reads, and that are variables or buffers of no level. Some of them move."""

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.scope import Slot, original
from nestor.autodiff.torch_private import tensor_slot, version
from nestor.errors import NestorWarning
from nestor.vectors import Params

Held: TypeAlias = tuple[Tensor, int, object]
"""A tensor, the address of its storage, and its version."""

# Constants of this size are copied, however few variables the level has: a copy takes some milliseconds.
_SMALL = 64 * 2**20
# A change through ``tensor.data`` does not show in the version of the tensor. The first looks compare values too.
_COMPARED = 32


class Constants:
    """The constants of one loss, such as the parameters of a teacher. Those that move are noted like buffers.

    Nothing tells in advance which of them something will move: a callback, or the loss itself. Until one has moved, a
    look at all of them costs a fraction of a microsecond each, and one copy of them is held if it is not larger than
    the level's variables, or small.

    Args:
        level: Name of the level, for a warning.
        slots: Where modules hold the constants, with their names in the reader.
        variables: The variables of the level.

    Attributes:
        moving: The indices of the constants that have moved.
    """

    def __init__(self, level: str, slots: Sequence[tuple[str, Slot]], variables: Params) -> None:
        self.moving: set[int] = set()
        self._level = level
        self._slots = slots
        self._budget = max(_SMALL, sum(v.nbytes for v in variables))
        self._held: list[Held | None] = []
        self._copies: list[Tensor | None] = []
        self._looks = 0
        self._has_warned = False

    def look(self) -> None:
        """Notice which constants have moved since the last look, and copy those that have."""
        if is_tracing():
            return
        present = [self._present(index) for index in range(len(self._slots))]
        held = [(t, t.data_ptr(), version(t)) if t is not None else None for t in present]
        if not self._held:
            fits = sum(t.nbytes for t in present if t is not None) <= self._budget
            self._copies = [_copy(t) if fits or i in self.moving else None for i, t in enumerate(present)]
        else:
            compares = self._looks < _COMPARED
            for index, (before, now) in enumerate(zip(self._held, held, strict=True)):
                same = _is_same(before, now)
                is_suspect = not same or compares or index in self.moving
                if is_suspect and _differs(self._copies[index], present[index], same=same):
                    self.moving.add(index)
                    self._copies[index] = _copy(present[index])
        self._held = held
        self._looks += 1

    def _present(self, index: int) -> Tensor | None:
        """Return the tensor that a module holds; None if it holds none, or a result of the last evaluation."""
        found = original(*self._slots[index][1])
        return found if isinstance(found, Tensor) and found.is_leaf else None

    def values(self) -> list[Tensor | None]:
        """Return copies of the present values for a record; a copy is shared until the constant moves.

        None stands for a constant that is too large to be copied before it has moved.
        """
        self.look()
        return list(self._copies)

    def since(self) -> Callable[[], bool]:
        """Return a function that tells whether a constant has moved since this call."""
        then = self.values()
        return lambda: any(a is not b for a, b in zip(then, self.values(), strict=True))

    def placed(self, values: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
        """Return what an evaluation without side effects puts into the modules, by name in the reader.

        Args:
            values: The values of a record; None takes the present ones.
        """
        if is_tracing():
            return {}
        self.look()
        copies: dict[int, Tensor] = {}
        tensors = {}
        # In its first evaluations the loss may turn out to move what it reads: all that fit get copies.
        for index in self.moving if self._looks > _COMPARED else range(len(self._slots)):
            present = self._present(index)
            if present is None or (index not in self.moving and self._copies[index] is None):
                continue
            value = present
            if values is not None and index < len(values) and index in self.moving:
                value = self._recorded(index, values[index], present)
            tensors[self._slots[index][0]] = copies.setdefault(id(present), value.detach().clone())
        return tensors

    def _recorded(self, index: int, value: Tensor | None, present: Tensor) -> Tensor:
        if value is None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Level {self._level!r}: the constant {self._slots[index][0]!r} has moved for the first time. It "
                "is too large to be copied in advance, so the steps before are replayed with its present value; later "
                "ones with the value that they had.",
                NestorWarning,
                stacklevel=2,
            )
        return present if value is None else value

    def check(self, placed: Mapping[str, Tensor]) -> None:
        """Notice which of the copies that :meth:`placed` returned the evaluation has moved."""
        if len(placed) > len(self.moving):
            for index, (name, _) in enumerate(self._slots):
                copy, present = placed.get(name), self._present(index)
                if index not in self.moving and copy is not None and _differs(copy, present, same=True):
                    self.moving.add(index)

    def saved(self) -> list[tuple[Tensor, Tensor]]:
        """Pair the moving constants with copies of their values, to undo a step."""
        present = [self._present(index) for index in self.moving]
        return [(t.detach(), t.detach().clone()) for t in present if t is not None]

    def restore(self, values: Sequence[Tensor | None]) -> None:
        """Set the moving constants to values that :meth:`values` returned."""
        for index in self.moving:
            value, present = values[index], self._present(index)
            if value is not None and present is not None:
                present.detach().copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return which constants move, and the number of looks."""
        return {"moving": sorted(self.moving), "looks": self._looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the values that the constants have now are those of the state."""
        self.moving, self._looks, self._held = set(state["moving"]), state["looks"], []


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _is_same(before: Held | None, now: Held | None) -> bool:
    if before is None or now is None:
        return before is now
    return before[0] is now[0] and before[1:] == now[1:]


def _differs(copy: Tensor | None, present: Tensor | None, *, same: bool) -> bool:
    """Compare values if there is a copy: a tensor that was written with its own values has not moved."""
    if present is None:
        return False
    if copy is None:
        return not same
    return copy.shape != present.shape or copy.dtype != present.dtype or not torch.equal(copy, present)


def constant_slots(modules: nn.Module, function: Callable[..., Any], owned: Collection[int]) -> dict[str, Slot]:
    """Find the tensors that a function reads, but for its variables and the buffers of the levels.

    Args:
        modules: Contains the modules that are arguments of the function.
        function: The function.
        owned: The identities of the parameters to omit.
    """
    own = set(modules.modules())
    found: dict[str, Slot] = {}
    for start, tree in [("", modules), *_modules_outside(function)]:
        for prefix, module in tree.named_modules(prefix=start):
            if tree is not modules and module in own:
                continue
            named = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            if tree is not modules:
                named |= dict(module.named_buffers(recurse=False, remove_duplicate=False))
            slots = {name: tensor_slot(module, name) for name, tensor in named.items() if id(tensor) not in owned}
            attributes = vars(module)
            slots |= {
                n: (attributes, n) for n, v in attributes.items() if isinstance(v, Tensor) and not v.requires_grad
            }
            found |= {f"{prefix}.{name}": slot for name, slot in slots.items() if _is_watchable(slot[0][slot[1]])}
    return found


def _is_watchable(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_inference()


def _modules_outside(function: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    """Name the modules that a function, or another of its file that it calls, reads otherwise than by its arguments."""
    waiting, seen = [function], {id(function)}
    while waiting:
        bound, file = _bound(waiting.pop())
        for name, value in bound.items():
            if id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, nn.Module):
                    yield name, value
                elif inspect.isfunction(value) and value.__globals__ is file:
                    waiting.append(value)


def _bound(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Name what a function reads otherwise than by its arguments; the second result is the namespace of its file.

    That is bound by a partial, in its closure, global, or an attribute of the object that a method is bound to.
    """
    bound: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        bound |= {**{f"argument_{index}": value for index, value in enumerate(function.args)}, **function.keywords}
        function = function.func
    if isinstance(function, nn.Module):
        bound["loss"], function = function, function.forward
    if inspect.ismethod(function):
        own = function.__self__
        bound |= {"self": own} if isinstance(own, nn.Module) else _attributes(own)
        function = function.__func__
    elif not inspect.isfunction(function):
        bound |= _attributes(function)
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return bound, None
    try:
        names = inspect.getclosurevars(function)
    except ValueError:  # a variable of the closure has no value yet
        return bound, function.__globals__
    return {**bound, **names.globals, **names.nonlocals}, function.__globals__


def _attributes(value: object) -> dict[str, Any]:
    try:
        return vars(value)
    except TypeError:  # an object with slots
        return {}
