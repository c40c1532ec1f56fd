r"""Normalizations on dual numbers, written out: values and tangents of batch, group and layer normalization.

.. math:: y = w \hat x + b, \quad \hat x = r (x - \mu), \qquad
    \dot y = w r\, (\dot x - \bar{\dot x} - \hat x\, \overline{\hat x \dot x}) + \dot w \hat x + \dot b

A bar is the mean over the entries that are normalized together. Torch's forward mode takes two to three times as long
for large images: it computes the tangents of mean and scale by operations on all entries.
"""

from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.forward_mode import Dual


def layer_norm(x: Dual, shape: Any, weight: Dual, bias: Dual, eps: float) -> Dual:
    """Normalize the last dimensions, of a given shape; see :func:`torch.nn.functional.layer_norm`."""
    dims = tuple(range(-len(shape), 0))
    value, mean, scale = torch.native_layer_norm(x[0], shape, weight[0], bias[0], eps)
    hat, change = (x[0] - mean).mul_(scale), x[1]
    inner = torch.addcmul(
        change - change.mean(dims, keepdim=True), hat, (hat * change).mean(dims, keepdim=True), value=-1
    )
    return value, inner.mul_(scale * weight[0]).addcmul_(hat, weight[1]).add_(bias[1])


def batch_norm(
    x: Dual,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Dual | None,
    bias: Dual | None,
    momentum: float,
    eps: float,
) -> Dual:
    """Normalize each channel of a batch by its own statistics, and update the running ones, in place."""
    value, centre, scale = torch.native_batch_norm(
        x[0], weight and weight[0], bias and bias[0], mean, variance, True, momentum, eps
    )
    shape = (1, -1, *[1] * (x[0].dim() - 2))
    others = (0, *range(2, x[0].dim()))
    centred = x[0] - centre.view(shape)
    means = x[1].mean(others), (centred * x[1]).mean(others)
    return value, _tangent(centred, x[1], scale, means, weight, bias, shape)


def group_norm(x: Dual, groups: int, weight: Dual | None, bias: Dual | None, eps: float) -> Dual:
    """Normalize groups of channels of each sample; see :func:`torch.nn.functional.group_norm`."""
    samples, channels = x[0].shape[:2]
    grouped = (samples, groups, -1)
    size = x[0].numel() // (samples * channels)
    value, centre, scale = torch.native_group_norm(
        x[0].contiguous(), weight and weight[0], bias and bias[0], samples, channels, size, groups, eps
    )
    change = x[1].reshape(grouped)
    centred = x[0].reshape(grouped) - centre.view(samples, groups, 1)
    means = change.mean(-1), (centred * change).mean(-1)
    each, *averages = (t.view(samples, groups).repeat_interleave(channels // groups, 1) for t in (scale, *means))
    shape = (samples, channels, *[1] * (x[0].dim() - 2))
    return value, _tangent(centred.view_as(x[0]), x[1], each, averages, weight, bias, shape)


def _tangent(
    centred: Tensor, change: Tensor, scale: Tensor, means: Any, weight: Dual | None, bias: Dual | None, shape: Any
) -> Tensor:
    """Return the tangent, as a sum of multiples of ``change`` and of ``centred`` with one factor a channel.

    Args:
        centred: The input minus its mean.
        change: The tangent of the input.
        scale: One divided by the standard deviation, of each channel (of each sample).
        means: The means of ``change`` and of ``centred * change``.
        weight: Of each channel; None is one.
        bias: Of each channel; None is zero.
        shape: The shape in which numbers of channels are like the input.
    """
    factor = scale if weight is None else scale * weight[0]
    along = -factor * means[1] * scale.square()
    shift = -factor * means[0]
    if weight is not None:
        along = along + weight[1] * scale
    if bias is not None:
        shift = shift + bias[1]
    return torch.addcmul(shift.view(shape), change, factor.view(shape)).addcmul_(centred, along.view(shape))
