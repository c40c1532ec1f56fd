"""A subclass of tensors on which the steps of torch's optimizers are differentiable."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.torch_private import call_on_plain


class Steppable(Tensor):
    """Makes the steps of torch's optimizers differentiable, without changing a value.

    - The square root has the derivative 0, not infinity, at 0.
    - SGD initializes its momentum buffer with ``grad.detach()``: ``detach`` returns the tensor itself.
    - Torch converts hyperparameters to Python numbers (``item()``, ``alpha=``, ``value=``): learned ones stay tensors.
    - In-place operations whose derivative needs the overwritten value work on a copy.
    """

    @classmethod
    def copy_of(cls, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, with its graph, as a ``Steppable``."""
        copy = tensor.as_subclass(Tensor).clone()
        copy.__class__ = cls
        return copy

    @classmethod
    def view_of(cls, tensor: Tensor) -> Tensor:
        """Return a view of a tensor as a ``Steppable``."""
        return tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Return the results of operations as ``Steppable``."""
        result = call_on_plain(func, args, kwargs)
        if type(result) is Tensor:
            # Not as_subclass: it returns a view, and in-place operations on views are slow.
            result.__class__ = cls
        return result

    def plain(self) -> Tensor:
        """Convert this object to an ordinary tensor."""
        self.__class__ = Tensor  # type: ignore[assignment]
        return self

    def sqrt(self) -> Tensor:
        zero = self == 0
        return torch.where(zero, 0.0, Tensor.sqrt(torch.where(zero, 1.0, self)))

    def sqrt_(self) -> Tensor:
        return self.copy_(self.clone().sqrt())

    def detach(self) -> Tensor:
        return self

    def item(self) -> Any:
        return self if self.requires_grad else Tensor.item(self)

    def add(self, other: Any, *, alpha: Any = 1) -> Tensor:  # type: ignore[override]
        return Tensor.add(self, other.clone() * alpha) if _learned(alpha) else Tensor.add(self, other, alpha=alpha)

    def add_(self, other: Any, *, alpha: Any = 1) -> Tensor:
        return Tensor.add_(self, other.clone() * alpha) if _learned(alpha) else Tensor.add_(self, other, alpha=alpha)

    def addcmul_(self, first: Any, second: Any, *, value: Any = 1) -> Tensor:
        if _learned(value) or first is self or second is self:
            return Tensor.add_(self, first * second * value)
        return Tensor.addcmul_(self, first, second, value=value)

    def addcdiv_(self, first: Any, second: Any, *, value: Any = 1) -> Tensor:
        if _learned(value):
            return Tensor.add_(self, first / second * value)
        return Tensor.addcdiv_(self, first, second, value=value)

    def mul_(self, other: Any) -> Tensor:
        return self.copy_(self.clone() * other) if _learned(other) else Tensor.mul_(self, other)

    def lerp_(self, end: Any, weight: Any) -> Tensor:
        if _learned(weight):
            start = self.clone()
            return self.copy_(start + weight * (end - start))
        return Tensor.lerp_(self, end, weight)


class DoublePowers(TorchFunctionMode):
    """Computes powers of a number with a tensor as exponent in double precision.

    Torch's bias corrections raise a number to the step counter: in single precision with ``differentiable=True``, in
    double precision otherwise.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__rpow__:
            exponent, base = args
            return torch.pow(base, exponent.clone() if exponent.requires_grad else exponent.double())
        return func(*args, **(kwargs or {}))


def _learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
