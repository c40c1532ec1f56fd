"""A bare tensor as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Variable(nn.Module):
    """A module whose only parameter is a tensor: the variable of a level that is not a network.

    Calling it returns the tensor, so a loss reads ``weights()[index]``.

    Args:
        tensor: The initial value, any shape, a floating type. A ``nn.Parameter`` is taken as it is, so an optimizer may
            hold it already; any other tensor is copied.

    Attributes:
        value: The parameter.

    Raises:
        TypeError: If the tensor is not floating point.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        if not tensor.is_floating_point():
            raise TypeError(f"Variable needs a floating point tensor, got {tensor.dtype}; write tensor.float().")
        is_parameter = isinstance(tensor, nn.Parameter)
        self.value = tensor if is_parameter else nn.Parameter(torch.clone(tensor.detach()))

    def forward(self) -> Tensor:
        """Return the tensor."""
        value = self._parameters.get("value")  # quicker than the attribute, which a parametrization takes the place of
        return self.value if value is None else value

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"shape={tuple(self.value.shape)}"
