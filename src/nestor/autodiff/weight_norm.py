"""Weight normalization whose second derivative is right: that of torch's fused operation is not (torch 2.13)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def normalizes_weights(root: nn.Module) -> bool:
    """Return whether a module has weights that torch normalizes, by a parametrization or by a hook."""
    for module in root.modules():
        names = {name for name, _ in module.named_parameters(recurse=False)}
        if type(module).__name__ == "_WeightNorm" or any(f"{n.removesuffix('_g')}_v" in names - {n} for n in names):
            return True
    return False


class ElementaryWeightNorm(TorchFunctionMode):
    r"""Computes :math:`g\, v / \lVert v \rVert` by elementary operations, with derivatives to any order.

    ``torch.autograd.gradgradcheck`` fails for torch's own operation: its second derivative leaves out a part of the
    derivative of the norm.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ == "_weight_norm":
            return _normalized(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def with_elementary_norms(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with :class:`ElementaryWeightNorm` during its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with ElementaryWeightNorm():
            return function(*args, **kwargs)

    return call


def _normalized(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [index for index in range(v.dim()) if dim == -1 or index != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True)) if others else v * (g / v.abs())
