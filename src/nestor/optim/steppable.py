"""A subclass of tensors on which the steps of torch's optimizers are differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.forward_mode import is_tracked
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
            result.__class__ = Steppable
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

    @property
    def data(self) -> Tensor:
        if is_tracked(self):
            raise UntrackedError("reads or changes .data of a tensor, as under no_grad")
        return Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        if is_tracked(self) or is_tracked(value):
            raise UntrackedError("replaces .data of a tensor, as under no_grad")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def item(self) -> Any:
        # A copy: torch may overwrite the tensor after it has read the number.
        return self.clone() if _learned(self) else Tensor.item(self)

    def __float__(self) -> float:
        return float(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def tolist(self) -> Any:
        self._number()
        return Tensor.tolist(self)

    def _number(self) -> Tensor:
        if is_tracked(self):
            raise UntrackedError("converts a tensor to Python numbers")
        return self.as_subclass(Tensor)

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

    def clamp_(self, min: Any = None, max: Any = None) -> Tensor:
        if _learned(min) or _learned(max):
            low, high = (bound if bound is None else torch.as_tensor(bound, dtype=self.dtype) for bound in (min, max))
            return self.copy_(self.clone().clamp(low, high))
        return Tensor.clamp_(self, min, max)

    def lerp_(self, end: Any, weight: Any) -> Tensor:
        if _learned(weight):
            start = self.clone()
            return self.copy_(start + weight * (end - start))
        return Tensor.lerp_(self, end, weight)


class Hyperparameter(Steppable):
    """A hyperparameter that is a tensor: a term whose factor is zero, which torch leaves out, stays if learned."""

    def __ne__(self, other: object) -> Any:
        return True if other == 0 and is_tracked(self) else Tensor.__ne__(self, other)

    def __gt__(self, other: Any) -> Any:
        return True if other == 0 and is_tracked(self) else Tensor.__gt__(self, other)


class UntrackedError(RuntimeError):
    """A step computes something without a derivative; the message continues the name of the optimizer."""


class Stepping(TorchFunctionMode):
    """Watches the operations of a step.

    - An operation under ``no_grad`` on a tensor with a graph raises an error.
    - Powers of a number with a tensor as exponent are computed in double precision. Torch's bias corrections raise a
      number to the step counter: in single precision with ``differentiable=True``, in double precision otherwise.
    """

    def __enter__(self) -> Any:
        """Note whether a graph is built."""
        self._builds_graph = torch.is_grad_enabled()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__rpow__:
            exponent, base = args
            return torch.pow(base, exponent.clone() if _learned(exponent) else exponent.double())
        result = func(*args, **(kwargs or {}))
        if self._builds_graph and not torch.is_grad_enabled() and isinstance(result, Tensor):
            self._check(func, result, [*args, *(kwargs or {}).values()])
        return result

    def _check(self, func: Any, result: Tensor, arguments: Sequence[Any]) -> None:
        flat = [a for argument in arguments for a in (argument if isinstance(argument, list | tuple) else [argument])]
        graphs = [a for a in flat if isinstance(a, Tensor) and a.requires_grad]
        changed = any(result is a for a in flat)
        if graphs and result.is_floating_point() and (changed or not result.requires_grad) and func not in _NEW:
            raise UntrackedError("computes under no_grad and ignores differentiable=True")


# Operations whose result depends on the shape of their argument only.
_NEW = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)


def _learned(value: Any) -> bool:
    return isinstance(value, Tensor) and is_tracked(value)
