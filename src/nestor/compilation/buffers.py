"""The buffers of the modules of a graph: its arguments, and, where a loss changes them, its results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nestor.autodiff.scope import Slot
from nestor.autodiff.torch_private import intercept_operations
from nestor.compilation.arguments import Arguments, Unpack, Unsuitable
from nestor.levels.level import Level

Values = list[tuple[list[Slot], Tensor]]
"""For each buffer, the slots of the modules that hold it, and its placeholder."""


class HeldModules:
    """The modes and the buffers of all modules that some levels read.

    Args:
        levels: The levels.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        self._modules: list[nn.Module] = list({m: None for level in levels for m in level.loss.reader.modules()})
        slots = {(id(slot[0]), slot[1]): slot for level in levels for _, slot in level.loss.buffers}
        self._slots = list(slots.values())
        self._modes: list[bool] = []
        self._held: list[Any] = []
        self._buffers: list[Tensor] = []
        self._first = 0

    def pack(self, arguments: Arguments) -> Unpack[Values]:
        """Pack the buffers; the modes are constants of the graph."""
        self._modes, self._held = self._present()
        held = {id(b): b for b in self._held if b is not None}
        self._buffers, self._first = list(held.values()), len(arguments.tensors)
        arguments.key.append((*self._modes, *(None if b is None else list(held).index(id(b)) for b in self._held)))
        unpack = arguments.add_variables([b.detach() for b in self._buffers])
        slots = [[slot for slot, b in zip(self._slots, self._held, strict=True) if b is held[key]] for key in held]
        return lambda flat: list(zip(slots, unpack(flat), strict=True))

    def is_same(self) -> bool:
        """Return whether the modules have the same modes and hold the same buffers."""
        modes, held = self._present()
        return modes == self._modes and all(a is b for a, b in zip(held, self._held, strict=True))

    def targets(self, arguments: Sequence[Tensor], changed: Sequence[int]) -> list[Tensor]:
        """Return the arguments that some buffers are."""
        return [arguments[self._first + index] for index in changed]

    def _present(self) -> tuple[list[bool], list[Any]]:
        return [module.training for module in self._modules], [owner[name] for owner, name in self._slots]


class PlacedBuffers:
    """Placeholders in the place of buffers, and the values that the traced operations give them.

    Operations that would change a placeholder in place are replaced by ones that return the new value, which later
    operations read.

    Args:
        values: The placeholders.
    """

    def __init__(self, values: Values) -> None:
        self._values = values
        self._now: dict[int, Tensor] = {id(value): value for _, value in values}
        self._stale: dict[int, Tensor] = {}
        self._memory = {value.untyped_storage().data_ptr() for _, value in values}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the placeholders into the modules."""
        before = [(owner, name, owner[name]) for slots, _ in self._values for owner, name in slots]
        for slots, value in self._values:
            for owner, name in slots:
                owner[name] = value
        try:
            with intercept_operations(self._call):
                yield
        finally:
            for owner, name, value in before:
                owner[name] = value

    def changed(self) -> tuple[list[int], list[Tensor]]:
        """Return the indices of the buffers that were changed, and their values."""
        pairs = [(index, self._now[id(value)]) for index, (_, value) in enumerate(self._values)]
        found = [(index, now) for index, now in pairs if now is not self._values[index][1]]
        return [index for index, _ in found], [now for _, now in found]

    def _call(self, function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        name = function.overloadpacket.__name__
        if "batch_norm" in name:
            return self._normalize(function, arguments, options)
        # Operations that change their first argument have names such as add_.
        target = options.get("out", arguments[0] if name.endswith("_") and arguments else None)
        if isinstance(target, Tensor) and target.untyped_storage().data_ptr() in self._memory:
            pure = _PURE.get(name)
            if id(target) not in self._now or pure is None:
                raise Unsuitable(f"it changes a buffer by {function}, and a graph changes none in place")
            self._now[id(target)] = pure(*map(self._read, arguments), **options).to(target.dtype)
            return target
        return function(*map(self._read, arguments), **options)

    def _normalize(self, function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Normalize a batch, and update the running statistics of its features."""
        if "backward" in function.overloadpacket.__name__:
            return function(*(self._now.get(id(a), a) for a in arguments), **options)
        if function is not torch.ops.aten.native_batch_norm.default:
            if any(id(a) in self._now for a in arguments):
                raise Unsuitable(f"{function} changes buffers in place, and a graph changes none")
            return function(*arguments, **options)
        x, weight, bias, mean, variance, training, momentum, eps = arguments
        if not training or mean is None:
            return function(*map(self._read, arguments), **options)
        others = [dim for dim in range(x.dim()) if dim != 1]
        for running, value in ((mean, x.mean(others)), (variance, x.var(others))):
            if id(running) in self._now:
                before = self._now[id(running)]
                self._now[id(running)] = (1 - momentum) * before + momentum * value.to(before.dtype)
            else:  # the copy of a buffer: nothing may read what would have been written into it
                self._stale[id(running)] = running
        return function(x, weight, bias, None, None, training, momentum, eps)

    def _read(self, argument: Any) -> Any:
        """Return the present value of a placeholder."""
        if isinstance(argument, Tensor):
            if id(argument) in self._stale:
                raise Unsuitable("it reads running statistics of a copy of a module")
            return self._now.get(id(argument), argument)
        return [self._read(part) for part in argument] if type(argument) is list else argument


# What an operation writes, as a function of its arguments.
_PURE: Mapping[str, Callable[..., Tensor]] = {
    "add_": torch.ops.aten.add,
    "sub_": torch.ops.aten.sub,
    "mul_": torch.ops.aten.mul,
    "div_": torch.ops.aten.div,
    "lerp_": torch.ops.aten.lerp,
    "fill_": torch.full_like,
    "zero_": torch.zeros_like,
    "copy_": lambda target, source, *_: source.expand_as(target).clone(),
}
