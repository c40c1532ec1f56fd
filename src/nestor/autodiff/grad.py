"""One reverse pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.autodiff.torch_private import run_backward
from nestor.autodiff.tracing import is_tracing

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
