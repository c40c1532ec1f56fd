"""Scalars of an iteration: Python floats on the CPU, tensors on an accelerator, where reading one would synchronize."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing, placeholder_value

Scalar: TypeAlias = float | Tensor
Flag: TypeAlias = bool | Tensor


def read_or_keep(value: Tensor) -> Scalar:
    """Return a float on the CPU, and the tensor itself on an accelerator, where reading it would synchronize.

    While tracing, return the placeholder value; if the trace has none, return the tensor.
    """
    if is_tracing():
        number = placeholder_value()
        return value if number is None else number
    return float(value) if value.is_cpu else value


def where(condition: Flag, a: Scalar, b: Scalar) -> Scalar:
    """Return ``a`` where the condition holds, else ``b``."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def divide(a: Scalar, b: Scalar, unless: Flag = False) -> Scalar:
    """Return ``a / b``: zero where ``unless`` holds, NaN where ``b`` is zero otherwise."""
    if isinstance(unless, Tensor):
        return torch.where(unless, 0.0, a / torch.where(unless, 1.0, b))
    if unless:
        return 0.0
    return math.nan if not isinstance(b, Tensor) and b == 0 else a / b


def magnitude(a: Scalar) -> Scalar:
    """Return the absolute value."""
    return a.abs() if isinstance(a, Tensor) else abs(a)


def least(a: Scalar, b: Scalar) -> Scalar:
    """Return the smaller scalar; NaN if ``b`` is NaN."""
    if isinstance(b, Tensor):
        return torch.clamp(b, max=a)
    return b if not b >= a else a


def largest(a: Scalar, b: Scalar) -> Scalar:
    """Return the larger scalar; NaN if ``a`` is NaN."""
    if isinstance(a, Tensor):
        return torch.clamp(a, min=b)
    return a if not a <= b else b


def tensor(value: Scalar, like: Tensor) -> Tensor:
    """Return a tensor with the dtype and device of ``like``."""
    return value if isinstance(value, Tensor) else like.new_full((), value)  # half the time of torch.tensor
