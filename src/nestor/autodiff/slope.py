"""Reverse over forward: the slope of an objective along a direction, with a graph to its other arguments."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from nestor.autodiff.forward_mode import DualMode, dual
from nestor.autodiff.normalization import batch_norm, group_norm, layer_norm
from nestor.autodiff.recurrent import CELLS, run_layers


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
        rule = _RULES.get(func)
        found = None if rule is None else rule(func, args, kwargs or {})
        if found is None:
            found = super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.__setitem__:
            self._check(func, args[:1])
        elif isinstance(found, Tensor):
            if found.requires_grad and _tangent(found) is not None:
                self._check(func, (args, kwargs))
                self._known[id(found)] = found
        elif isinstance(found, tuple | list) and any(
            t.requires_grad and _tangent(t) is not None for t in _tensors(found)
        ):
            self._check(func, (args, kwargs))
            self._known.update({id(t): t for t in _tensors(found)})
        return found

    def slope(self, value: Tensor) -> Tensor | None:
        """Return the tangent of the objective, with its graph; None if it does not depend on the inputs."""
        slope = _tangent(value)
        if slope is None or not slope.requires_grad:
            return None
        self._check("", (value,))
        return slope

    def _check(self, func: Any, arguments: Any) -> None:
        """Raise an error if the operation is not separable, or a tensor with both comes from an unknown operation."""
        if func and func not in SEPARABLE:
            raise NotSeparableError(getattr(func, "__name__", str(func)))
        for t in _tensors(arguments):
            if t.requires_grad and self._known.get(id(t)) is not t and _tangent(t) is not None:
                raise NotSeparableError("an operation that is not observed")


def _tangent(number: Tensor) -> Tensor | None:
    """Return the tangent with its graph; None if there is none. In ``torch.no_grad`` there is none."""
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    return found


def _primal(number: Tensor) -> Tensor:
    """Return the value with its graph, without the tangent."""
    found: Tensor = forward_ad.unpack_dual(number).primal  # type: ignore[no-untyped-call]
    return found


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _layer(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """Apply a layer with dual parameters to an input without a tangent; torch also applies it to a tangent of zeros."""
    if len(args) < 2 or "bias" in options:
        return None
    x, weight, bias, *rest = args if len(args) > 2 else (*args, None)
    if x.requires_grad or _tangent(x) is not None:
        return None
    direction, shift = _tangent(weight), None if bias is None else _tangent(bias)
    if direction is None or (bias is not None and shift is None):
        return None
    x = x.contiguous()
    value = func(x, _primal(weight), None if bias is None else _primal(bias), *rest, **options)
    return dual(value, func(x, direction, shift, *rest, **options))


def _product(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """Multiply a tensor with a tangent by one without; torch also adds a product with a tangent of zeros."""
    if options or not all(isinstance(factor, Tensor) for factor in args):
        return None
    a, b = args
    left, right = _tangent(a), _tangent(b)
    if left is None and right is not None:
        return dual(_primal(a) * _primal(b), _primal(a) * right)
    if right is None and left is not None:
        return dual(_primal(a) * _primal(b), left * _primal(b))
    return None


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """Normalize layers with a weight and a bias."""
    if weight is None or bias is None:
        return None
    found = _duals(input, weight, bias)
    return None if found is None else dual(*layer_norm(found[0], normalized_shape, found[1], found[2], eps))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Normalize batches by their own statistics."""
    found = _duals(input, weight, bias)
    if found is None or not training or input.dim() < 2 or input.numel() <= input.shape[1]:
        return None
    return dual(*batch_norm(found[0], running_mean, running_var, found[1], found[2], momentum, eps))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """Normalize groups of channels."""
    found = _duals(input, weight, bias)
    if found is None or input.dim() < 2 or input.shape[1] % num_groups:
        return None
    return dual(*group_norm(found[0], num_groups, found[1], found[2], eps))


def _duals(x: Tensor, *parameters: Tensor | None) -> list[Any] | None:
    """Return values and tangents; None if the input has no tangent, a tensor has a graph, or the dtypes differ."""
    given = [t for t in (x, *parameters) if t is not None]
    if _tangent(x) is None or any(t.requires_grad or t.dtype != x.dtype for t in given):
        return None
    return [None if t is None else _dual_pair(t) for t in (x, *parameters)]


def _recurrent(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Apply an LSTM or a GRU; None for packed sequences, dropout between layers, projections, tensors with graphs."""
    if len(args) != 9 or options or not isinstance(args[3], bool):
        return None
    x, first, weights, biases, count, dropout, training, bidirectional, batch_first = args
    first = [first] if isinstance(first, Tensor) else list(first)
    directions = 2 if bidirectional else 1
    if (dropout and training and count > 1) or len(weights) != count * directions * (4 if biases else 2):
        return None
    if any(t.requires_grad for t in (x, *first, *weights)):
        return None
    x = x.transpose(0, 1) if batch_first else x
    states, pairs = [_dual_pair(t) for t in first], [_dual_pair(t) for t in weights]
    (value, direction), ends = run_layers(
        CELLS[func], (_primal(x), _tangent(x)), states, pairs, biases=biases, directions=directions
    )
    if batch_first:
        value, direction = value.transpose(0, 1), direction.transpose(0, 1)
    return (dual(value, direction), *(dual(end, change) for end, change in ends))


def _dual_pair(number: Tensor) -> tuple[Tensor, Tensor]:
    value, direction = _primal(number), _tangent(number)
    return value, torch.zeros_like(value) if direction is None else direction


def _call(rule: Callable[..., Any], func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Call a rule with the arguments of the function, some of which are named."""
    return rule(*args, **options)


_NORMALIZATIONS = ((F.layer_norm, _layer_norm), (F.batch_norm, _batch_norm), (F.group_norm, _group_norm))
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_RULES: Mapping[Any, Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]] = {
    **{function: partial(_call, rule) for function, rule in _NORMALIZATIONS},
    **dict.fromkeys(CELLS, _recurrent),
    **dict.fromkeys(_LAYERS, _layer),
    **dict.fromkeys(_PRODUCTS, _product),
}

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
