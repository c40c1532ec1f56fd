"""Tensors on which torch's optimizers are differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.torch_private import call_on_plain


class Steppable(Tensor):
    """Mends what stops a derivative inside torch's optimizers, without changing a value.

    - A square root has the derivative 0, not infinity, at 0.
    - SGD's first momentum buffer is ``grad.detach()``: detaching does nothing here.
    - Hyperparameters become Python numbers (``item()``, ``alpha=``, ``value=``): learned ones stay tensors.
    - In-place operations whose derivative needs the value that they overwrite work on a copy.
    """

    @classmethod
    def copy_of(cls, tensor: Tensor) -> Tensor:
        """Copy a tensor, with its graph, as one of these."""
        copy = tensor.as_subclass(Tensor).clone()
        copy.__class__ = cls
        return copy

    @classmethod
    def view_of(cls, tensor: Tensor) -> Tensor:
        """View a tensor as one of these."""
        return tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Let the results of operations be of the same kind."""
        result = call_on_plain(func, args, kwargs)
        if type(result) is Tensor:
            # Not as_subclass: that is a view, and in-place operations on views are slow.
            result.__class__ = cls
        return result

    def plain(self) -> Tensor:
        """Become an ordinary tensor again."""
        self.__class__ = Tensor  # type: ignore[assignment]
        return self

    def sqrt(self) -> Tensor:
        """Differentiable at 0."""
        zero = self == 0
        return torch.where(zero, 0.0, Tensor.sqrt(torch.where(zero, 1.0, self)))

    def sqrt_(self) -> Tensor:
        """Differentiable at 0."""
        return self.copy_(self.clone().sqrt())

    def detach(self) -> Tensor:
        """Keep the graph."""
        return self

    def item(self) -> Any:
        """Stay a tensor if it is learned."""
        return self if self.requires_grad else Tensor.item(self)

    def add(self, other: Any, *, alpha: Any = 1) -> Tensor:  # type: ignore[override]
        """Take a learned ``alpha``."""
        return Tensor.add(self, other.clone() * alpha) if _learned(alpha) else Tensor.add(self, other, alpha=alpha)

    def add_(self, other: Any, *, alpha: Any = 1) -> Tensor:
        """Take a learned ``alpha``."""
        return Tensor.add_(self, other.clone() * alpha) if _learned(alpha) else Tensor.add_(self, other, alpha=alpha)

    def addcmul_(self, first: Any, second: Any, *, value: Any = 1) -> Tensor:
        """Take a learned ``value``."""
        if _learned(value) or first is self or second is self:
            return Tensor.add_(self, first * second * value)
        return Tensor.addcmul_(self, first, second, value=value)

    def addcdiv_(self, first: Any, second: Any, *, value: Any = 1) -> Tensor:
        """Take a learned ``value``."""
        if _learned(value):
            return Tensor.add_(self, first / second * value)
        return Tensor.addcdiv_(self, first, second, value=value)

    def mul_(self, other: Any) -> Tensor:
        """Keep the value that a learned factor multiplies."""
        return self.copy_(self.clone() * other) if _learned(other) else Tensor.mul_(self, other)

    def lerp_(self, end: Any, weight: Any) -> Tensor:
        """Keep the values that a learned weight mixes."""
        if _learned(weight):
            start = self.clone()
            return self.copy_(start + weight * (end - start))
        return Tensor.lerp_(self, end, weight)


class DoublePowers(TorchFunctionMode):
    """Raises a number to a tensor in double precision.

    torch's bias corrections are powers of a step counter in single precision when they are differentiable, and in
    double precision when they are not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Convert the exponent."""
        if func is Tensor.__rpow__:
            exponent, base = args
            return torch.pow(base, exponent.clone() if exponent.requires_grad else exponent.double())
        return func(*args, **(kwargs or {}))


def _learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
