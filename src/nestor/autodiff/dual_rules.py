"""Operations on dual numbers that are written out, because torch's forward mode is slow; their tangents have a graph.

A rule returns None where it does not apply: torch's forward mode is then used. All rules but that of products require
that no argument has a graph.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from nestor.autodiff.attention import attend, causal_mask
from nestor.autodiff.forward_mode import Dual, dual, is_tracked
from nestor.autodiff.normalization import batch_norm, group_norm, layer_norm
from nestor.autodiff.recurrent import CELLS, run_layers


def tangent_of(number: Tensor) -> Tensor | None:
    """Return the tangent with its graph; None if there is none. In ``torch.no_grad`` there is none."""
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    return found


def primal_of(number: Tensor) -> Tensor:
    """Return the value with its graph, without the tangent."""
    found: Tensor = forward_ad.unpack_dual(number).primal  # type: ignore[no-untyped-call]
    return found


def _layer(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """Apply a layer with dual parameters to an input without a tangent; torch also applies it to a tangent of zeros."""
    if len(args) < 2 or "bias" in options:
        return None
    x, weight, bias, *rest = args if len(args) > 2 else (*args, None)
    if x.requires_grad or tangent_of(x) is not None:
        return None
    direction, shift = tangent_of(weight), None if bias is None else tangent_of(bias)
    if direction is None or (bias is not None and shift is None):
        return None
    x = x.contiguous()
    value = func(x, primal_of(weight), None if bias is None else primal_of(bias), *rest, **options)
    return dual(value, func(x, direction, shift, *rest, **options))


def _product(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """Multiply a tensor with a tangent by one without; torch also adds a product with a tangent of zeros."""
    if options or not all(isinstance(factor, Tensor) for factor in args):
        return None
    a, b = args
    left, right = tangent_of(a), tangent_of(b)
    if left is None and right is not None:
        return dual(primal_of(a) * primal_of(b), primal_of(a) * right)
    if right is None and left is not None:
        return dual(primal_of(a) * primal_of(b), left * primal_of(b))
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


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attend without dropout."""
    given = (query, key, value)
    if any(t.requires_grad for t in given) or all(tangent_of(t) is None for t in given):
        return None
    if dropout_p or enable_gqa or (is_causal and attn_mask is not None):
        return None
    if not (query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.dtype == key.dtype == value.dtype):
        return None
    if query.dtype not in _FULL:
        return None
    if attn_mask is not None and (is_tracked(attn_mask) or attn_mask.dtype not in (torch.bool, query.dtype)):
        return None
    if is_causal:
        attn_mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return dual(*attend(_dual_pair(query), _dual_pair(key), _dual_pair(value), attn_mask, scale))


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **rest: Any,
) -> tuple[Tensor, None] | None:
    """Attend to the queries themselves, in a batch, without masks and dropout."""
    used = (query, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    others = (bias_k, bias_v, key_padding_mask, attn_mask, rest.get("static_k"), rest.get("static_v"))
    if in_proj_weight is None or query is not key or key is not value or query.is_nested or query.dim() != 3:
        return None
    if any(t is not None for t in others) or any(t is not None and t.requires_grad for t in used):
        return None
    if add_zero_attn or need_weights or is_causal or (training and dropout_p):
        return None
    length, batch, size = query.shape
    if size != embed_dim_to_check or size % num_heads:
        return None
    heads = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    q, k, v = (t.reshape(length, batch * num_heads, -1).transpose(0, 1) for t in heads)
    found = _attention(q, k, v)
    if found is None:
        return None
    return F.linear(found.transpose(0, 1).reshape(length, batch, size), out_proj_weight, out_proj_bias), None


def _duals(x: Tensor, *parameters: Tensor | None) -> list[Any] | None:
    """Return values and tangents; None without a tangent, with a graph, in half precision, or if the dtypes differ."""
    given = [t for t in (x, *parameters) if t is not None]
    if tangent_of(x) is None or x.dtype not in _FULL or any(t.requires_grad or t.dtype != x.dtype for t in given):
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
        CELLS[func], (primal_of(x), tangent_of(x)), states, pairs, biases=biases, directions=directions
    )
    if batch_first:
        value, direction = value.transpose(0, 1), direction.transpose(0, 1)
    return (dual(value, direction), *(dual(end, change) for end, change in ends))


def _dual_pair(number: Tensor) -> Dual:
    value, direction = primal_of(number), tangent_of(number)
    return value, torch.zeros_like(value) if direction is None else direction


def _call(rule: Callable[..., Any], func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Call a rule with the arguments of the function, some of which are named."""
    return rule(*args, **options)


# In half precision, torch computes parts of a layer in single precision, by rules of its own.
_FULL = (torch.float32, torch.float64)
_NAMED = (
    *((F.layer_norm, _layer_norm), (F.batch_norm, _batch_norm), (F.group_norm, _group_norm)),
    *((F.scaled_dot_product_attention, _attention), (F.multi_head_attention_forward, _multi_head_attention)),
)
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
RULES: Mapping[Any, Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]] = {
    **{function: partial(_call, rule) for function, rule in _NAMED},
    **dict.fromkeys(CELLS, _recurrent),
    **dict.fromkeys(_LAYERS, _layer),
    **dict.fromkeys(_PRODUCTS, _product),
}
