"""Parameters of modules whose values are elsewhere."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ProcessError


class Released(nn.Parameter):
    """A parameter without memory, while shards hold its values: what reads them raises.

    Shape, dtype and device are known, and it can be printed.

    Raises:
        ProcessError: From every other operation on the parameter.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in KNOWN:
            with torch.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.__repr__:
            return f"Released(shape={tuple(args[0].shape)}, dtype={args[0].dtype})"
        raise ProcessError(
            f"{getattr(func, '__name__', func)} reads a parameter of a module whose values FullySharded() holds in "
            "shards. During a run, read modules in all processes within `with engine.runtime.whole_modules():`. After "
            "a run that an error has ended in some processes only, the values are in the shards of all processes: "
            "engine.runtime.end(), called in all of them, gathers them; or load a checkpoint."
        )


# Properties are known by their getters and setters.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn")
_METHODS = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point)
KNOWN = {
    *(access for name in _PROPERTIES for access in (getattr(Tensor, name).__get__, getattr(Tensor, name).__set__)),
    *_METHODS,
    *(Tensor.is_complex, Tensor.untyped_storage, Tensor.stride, Tensor.__len__, Tensor.__hash__, Tensor.requires_grad_),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
