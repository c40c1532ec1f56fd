"""Reverse passes: gradients and vector-Jacobian products."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.torch_private import run_backward


class _Ones(dict[torch.dtype, Tensor]):
    def __missing__(self, dtype: torch.dtype) -> Tensor:
        return self.setdefault(dtype, torch.ones((), dtype=dtype))


_ones = _Ones()


def grad(
    outputs: Sequence[Tensor],
    wrt: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    r"""Compute the VJP of ``outputs`` with respect to ``wrt``, as ``torch.autograd.grad`` does.

    .. math:: \sum_i \Big(\frac{\partial o_i}{\partial w}\Big)^T v_i

    Args:
        outputs: Tensors ``o`` with a graph, at least one.
        wrt: The tensors ``w``.
        vectors: The cotangents ``v``, one for each output and with its shape. None, for scalar outputs, means ones.
        create_graph: Whether the result is differentiable.
        retain_graph: Whether to keep the graph of ``outputs``; None means ``create_graph``.

    Returns:
        One dense tensor for each of ``wrt``, with its shape; None for a tensor that no output depends on.
    """
    # On an accelerator torch.autograd.grad starts the engine's threads, and its checks cost little next to kernels.
    if not outputs[0].is_cpu:
        given = None if vectors is None else list(vectors)
        return dense(
            torch.autograd.grad(
                list(outputs), list(wrt), given, retain_graph, create_graph=create_graph, allow_unused=True
            )
        )
    if vectors is None:
        # A tensor that is made while tracing belongs to the trace.
        ones = _Ones() if is_tracing() else _ones
        vectors = [ones[outputs[0].dtype]] if len(outputs) == 1 else [ones[output.dtype] for output in outputs]
    retain = create_graph if retain_graph is None else retain_graph
    found = run_backward(tuple(outputs), tuple(vectors), retain, create_graph, tuple(wrt), True, accumulate_grad=False)
    for g in found:
        if g is not None and g.is_sparse:
            return dense(found)
    return list(found)


def dense(found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Make sparse derivatives (``nn.Embedding(sparse=True)``) dense: vector algebra and second derivatives need it."""
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]


def scaled_grad(
    value: Tensor, wrt: Sequence[Tensor], loss_scale: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Compute the gradient of a scalar: differentiate ``value * loss_scale``, and divide the result by it."""
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
    """Compute the VJP of ``outputs`` with respect to ``wrt``, by one reverse pass.

    None means zero, in ``outputs``, in ``vector`` and in the result. Outputs without a graph are skipped.
    """
    live: list[Tensor] = []
    cotangents: list[Tensor] = []
    for output, cotangent in zip(outputs, vector, strict=True):
        if output is not None and cotangent is not None and output.requires_grad:
            live.append(output)
            cotangents.append(cotangent)
    if not live:
        return [None] * len(wrt)
    return grad(live, wrt, cotangents, create_graph=create_graph, retain_graph=retain_graph)


def accumulate(total: list[Tensor | None], values: Sequence[Tensor | None], factor: float = 1.0) -> list[Tensor | None]:
    """Return ``total + factor * values``, where None means zero."""
    scaled = values if factor == 1.0 else [None if v is None else v * factor for v in values]
    return [v if t is None else t if v is None else t + v for t, v in zip(total, scaled, strict=True)]


Params: TypeAlias = Sequence[Tensor]
