"""A bare tensor as a module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


class Variable(nn.Module):
    """A module with one parameter, for a level whose variable is a tensor and not a network.

    Calling the module returns the parameter: a loss writes ``weights()[index]``.

    Args:
        tensor: The initial value; any shape, floating point. A ``nn.Parameter`` becomes the parameter itself, so an
            optimizer may already hold it. Any other tensor is copied.

    Attributes:
        value: The parameter.

    Raises:
        TypeError: If the tensor is not floating point.

    Example:
        >>> weights = nestor.Variable(torch.zeros(5))
        >>> weights()[2:4].sum().backward()
        >>> weights.value.grad
        tensor([0., 0., 1., 1., 0.])
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Variable needs a floating-point tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            remedy = "torch.view_as_real(tensor)" if tensor.is_complex() else "tensor.float()"
            raise TypeError(f"Variable needs a floating-point tensor, got {tensor.dtype}; write {remedy}.")
        is_parameter = isinstance(tensor, nn.Parameter)
        self.value = tensor if is_parameter else nn.Parameter(torch.clone(tensor.detach()))

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self) -> Tensor:
            """Return the parameter, or its value under a parametrization."""
            ...

    def forward(self) -> Tensor:
        """Return the parameter, or its value under a parametrization."""
        # Faster than `self.value`, which nn.Module looks up in __getattr__. A parametrization moves the parameter away.
        value = self._parameters.get("value")
        return self.value if value is None else value

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"shape={tuple(self.value.shape)}"
