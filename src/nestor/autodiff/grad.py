"""Reverse passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.torch_private import run_backward

_ones: dict[torch.dtype, Tensor] = {}


def grad(
    outputs: Sequence[Tensor],
    wrt: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Multiply the transposed Jacobian of ``outputs`` in ``wrt`` onto ``vectors``, as ``torch.autograd.grad`` does.

    Args:
        outputs: Tensors with a graph, at least one.
        wrt: The tensors to differentiate in.
        vectors: One like each output. None is for scalar outputs, and means ones.
        create_graph: Whether the result is differentiable.
        retain_graph: Whether to keep the graph of ``outputs``; None means ``create_graph``.

    Returns:
        One tensor like each of ``wrt``; None where no output depends on it.
    """
    # On an accelerator torch.autograd.grad prepares the engine's threads; its checks are cheap beside kernels.
    if outputs[0].device.type != "cpu":
        given = None if vectors is None else list(vectors)
        return list(
            torch.autograd.grad(
                list(outputs), list(wrt), given, retain_graph, create_graph=create_graph, allow_unused=True
            )
        )
    if vectors is None:
        vectors = [_one(output.dtype) for output in outputs]
    retain = create_graph if retain_graph is None else retain_graph
    found = run_backward(tuple(outputs), tuple(vectors), retain, create_graph, tuple(wrt), True, accumulate_grad=False)
    return list(found)


def _one(dtype: torch.dtype) -> Tensor:
    if is_tracing():  # a tensor made while tracing belongs to the trace
        return torch.ones((), dtype=dtype)
    if dtype not in _ones:
        _ones[dtype] = torch.ones((), dtype=dtype)
    return _ones[dtype]


def scaled_grad(
    value: Tensor, wrt: Sequence[Tensor], loss_scale: Tensor | None, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Take the gradient of a scalar, scaled up on its way by ``loss_scale``; None stands for zero."""
    if loss_scale is None:
        return grad([value], wrt, create_graph=create_graph)
    grads = grad([value * loss_scale], wrt, create_graph=create_graph)
    return [None if g is None else g / loss_scale for g in grads]


def vjp(
    outputs: Sequence[Tensor | None],
    wrt: Sequence[Tensor],
    vector: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Multiply the transposed Jacobian of ``outputs`` in ``wrt`` onto ``vector``, by one reverse pass.

    None stands for zero: for an output without a graph, in the vector, and for a tensor that no output depends on.
    """
    pairs = [
        (o, v) for o, v in zip(outputs, vector, strict=True) if o is not None and v is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(wrt)
    return grad([o for o, _ in pairs], wrt, [v for _, v in pairs], create_graph=create_graph, retain_graph=retain_graph)


def accumulate(total: list[Tensor | None], values: Sequence[Tensor | None], factor: float = 1.0) -> list[Tensor | None]:
    """Add ``factor * values`` to ``total``, where ``None`` stands for zero."""
    scaled = values if factor == 1.0 else [None if v is None else v * factor for v in values]
    return [v if t is None else t if v is None else t + v for t, v in zip(total, scaled, strict=True)]


Params: TypeAlias = Sequence[Tensor]
