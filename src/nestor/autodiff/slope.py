"""Reverse over forward: the slope of an objective along a direction, with a graph to its other arguments."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestor.autodiff.dual_rules import RULES, tangent_of
from nestor.autodiff.forward_mode import DualMode


class NotSeparableError(Exception):
    """Tensors with tangents and tensors with graphs meet in an operation whose tangent may have another derivative."""


class SlopeMode(DualMode):
    r"""Evaluates an objective at dual variables so that the tangent of its value can be differentiated in reverse mode.

    .. math:: \frac{\partial}{\partial\lambda} \langle \nabla_\theta G(\theta, \lambda), v \rangle, \qquad
        \langle \nabla_\theta G, v \rangle = \text{tangent of } G(\theta + \varepsilon v, \lambda)

    The variables have tangents and no graph, the inputs have a graph and no tangents. Torch's tangents are correct
    numbers, but not all of them are differentiable functions: those of normalizations hold the statistics constant,
    that of ``log_softmax`` raises an error. A tensor with both must therefore be the result of an operation in
    ``SEPARABLE``, whose tangents are differentiable. Everything else raises :class:`NotSeparableError`: other
    operations, operations in place, and operations that no mode observes (custom Functions, the inside of
    ``torch.vmap``).
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        found = None if rule is None else rule(func, args, kwargs or {})
        if found is None:
            found = super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.__setitem__:
            self._check(func, args[:1])
        elif isinstance(found, Tensor):
            if found.requires_grad and tangent_of(found) is not None:
                self._check(func, (args, kwargs))
                self._known[id(found)] = found
        elif isinstance(found, tuple | list) and any(
            t.requires_grad and tangent_of(t) is not None for t in _tensors(found)
        ):
            self._check(func, (args, kwargs))
            self._known.update({id(t): t for t in _tensors(found)})
        return found

    def slope(self, value: Tensor) -> Tensor | None:
        """Return the tangent of the objective, with its graph; None if it does not depend on the inputs."""
        slope = tangent_of(value)
        if slope is None or not slope.requires_grad:
            return None
        self._check("", (value,))
        return slope

    def _check(self, func: Any, arguments: Any) -> None:
        """Raise an error if the operation is not separable, or a tensor with both comes from an unknown operation."""
        if func and func not in SEPARABLE:
            raise NotSeparableError(getattr(func, "__name__", str(func)))
        for t in _tensors(arguments):
            if t.requires_grad and self._known.get(id(t)) is not t and tangent_of(t) is not None:
                raise NotSeparableError("an operation that is not observed")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


_NAMES = (
    *("add", "sub", "neg", "mul", "multiply", "div", "matmul", "mm", "bmm", "dot", "outer", "mean", "sum"),
    *("square", "pow", "sqrt", "reciprocal", "rsqrt", "abs", "exp", "log", "log1p", "sin", "cos", "erf"),
    *("tanh", "sigmoid", "relu", "where", "maximum", "minimum", "clamp", "masked_fill", "index_select"),
    *("gather", "stack", "cat", "split", "chunk", "squeeze", "unsqueeze", "reshape", "flatten", "t"),
    *("transpose", "permute", "clone", "unbind", "flip", "roll", "narrow", "tril", "triu"),
)
SEPARABLE = frozenset(
    {
        *(getattr(torch, name) for name in _NAMES if name in vars(torch)),
        *(getattr(Tensor, name) for name in _NAMES if name in dir(Tensor)),
        *(Tensor.__rsub__, Tensor.__rtruediv__, Tensor.__pow__, Tensor.__abs__),
        *(Tensor.__getitem__, Tensor.view, Tensor.expand, Tensor.expand_as, Tensor.contiguous, Tensor.to, Tensor.float),
        *(
            F.linear,
            F.conv1d,
            F.conv2d,
            F.relu,
            F.softplus,
            F.logsigmoid,
            F.gelu,
            F.silu,
            F.elu,
            F.leaky_relu,
            F.mse_loss,
        ),
        *(F.max_pool2d, F.avg_pool2d, F.pad),
    }
)
"""Operations whose tangents are differentiable functions of their arguments; tests compare each with reverse mode."""
