"""Parameters whose values are elsewhere: they keep their shape, and every use of their values raises an error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodWrapperType
from typing import Any

import torch
from torch import Tensor, nn

from nestor.autodiff.torch_private import call_on_plain
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
    strides: tuple[int, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run what needs no values.

        Raises:
            UnsupportedError: If the operation needs values.
        """
        if func in _ALLOWED or isinstance(func, MethodWrapperType):
            return call_on_plain(func, args, kwargs)
        found = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Freed)]
        raise UnsupportedError(
            f"{getattr(func, '__name__', func)} was called on a parameter of a module that holds no values during a "
            "run: FullySharded() keeps them in shards. A loss reads the modules that it gets as arguments. A callback "
            "that needs whole variables, or changes them, does it inside `with engine.runtime.whole_modules():`, in "
            "all processes.",
            level=found[0].level if found else None,
        )


@torch.no_grad()
def restore(parameter: Tensor, value: Tensor) -> None:
    """Give a freed parameter memory of its own again, with a value."""
    assert isinstance(parameter, Freed)
    shape, strides = parameter.shape, parameter.strides
    parameter.__class__ = parameter.kind  # type: ignore[assignment]
    parameter.data = torch.empty_strided(shape, strides, dtype=parameter.dtype, device=parameter.device)
    parameter.copy_(value)


def free(level: str, parameters: Iterable[Tensor]) -> None:
    """Free the memory of the parameters of a level's module.

    Memory that another tensor uses too (a hook that keeps ``weight.data``) stays with that tensor.
    """
    for parameter in parameters:
        assert isinstance(parameter, nn.Parameter)
        kind, strides = type(parameter), parameter.stride()
        # Code that gets past the class, such as ``parameter.data``, reads one NaN instead of memory that is gone.
        parameter.data = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device).expand_as(parameter)
        parameter.__class__ = Freed
        assert isinstance(parameter, Freed)
        parameter.level, parameter.kind, parameter.strides = level, kind, strides


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
