"""Parameters whose values are elsewhere: they keep their shape, and every use of their values raises an error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import UnsupportedError

# What may be asked of a parameter that holds no values; attributes (shape, dtype, requires_grad) may always be read.
_ALLOWED = (
    *(Tensor.__hash__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.element_size),
    *(Tensor.is_complex, Tensor.is_floating_point, Tensor.stride, Tensor.untyped_storage, Tensor.requires_grad_),
)


class Freed(nn.Parameter):
    """The class of a module's parameter while its values are in shards."""

    level: str
    kind: type[nn.Parameter]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run what needs no values.

        Raises:
            UnsupportedError: If the operation needs values.
        """
        if func in _ALLOWED or func.__class__.__name__ == "method-wrapper":
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        found = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Freed)]
        raise UnsupportedError(
            f"{getattr(func, '__name__', func)} was called on a parameter of a module that holds no values during a "
            "run: FullySharded() keeps them in shards. A loss reads the modules that it gets as arguments. A callback "
            "that needs whole variables, or changes them, does it inside `with engine.runtime.whole_modules():`, in "
            "all processes.",
            level=found[0].level if found else None,
        )


@dataclass(frozen=True)
class Memory:
    """What a parameter was before it was freed.

    Attributes:
        parameter: The parameter.
        held: Its tensor, whose storage is empty.
    """

    parameter: Freed
    held: Tensor

    @torch.no_grad()
    def restore(self, value: Tensor) -> None:
        """Allocate the memory again, and fill it."""
        self.parameter.__class__ = self.parameter.kind  # type: ignore[assignment]
        self.held.untyped_storage().resize_(self.held.numel() * self.held.element_size())
        self.parameter.data = self.held
        self.parameter.copy_(value)


def free(level: str, parameters: Iterable[Tensor]) -> list[Memory]:
    """Free the memory of the parameters of a level's module."""
    freed = []
    for parameter in parameters:
        assert isinstance(parameter, nn.Parameter)
        kind, held = type(parameter), parameter.data
        held.untyped_storage().resize_(0)
        # Code that gets past the class, such as ``parameter.data``, reads one NaN instead of memory that is gone.
        parameter.data = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device).expand_as(parameter)
        parameter.__class__ = Freed
        assert isinstance(parameter, Freed)
        parameter.level, parameter.kind = level, kind
        freed.append(Memory(parameter, held))
    return freed


@contextmanager
def usable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let operations use the parameters, whose values the caller has set."""
    freed = [parameter for parameter in parameters if isinstance(parameter, Freed)]
    for parameter in freed:
        parameter.__class__ = parameter.kind  # type: ignore[assignment]
    try:
        yield
    finally:
        for parameter in freed:
            parameter.__class__ = Freed
