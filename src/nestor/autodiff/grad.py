"""One reverse pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Variable

from nestor.autodiff.tracing import tracing

# torch.autograd.grad checks its arguments and prepares the engine's threads before it calls this: on the CPU, where
# there are no such threads, that takes as long as the derivative of a small loss.
_run = Variable._execution_engine.run_backward
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
        wrt: What to differentiate in.
        vectors: One like each output; None stands for ones, for scalars.
        create_graph: Whether the result is to be differentiated again.
        retain_graph: Whether the graph is to be used again; None means ``create_graph``.

    Returns:
        One tensor like each of ``wrt``; None where no output depends on it.
    """
    if outputs[0].device.type != "cpu":
        given = None if vectors is None else list(vectors)
        found = torch.autograd.grad(
            list(outputs), list(wrt), given, retain_graph, create_graph=create_graph, allow_unused=True
        )
        return list(found)
    if vectors is None:
        vectors = [_one(output.dtype) for output in outputs]
    retain = create_graph if retain_graph is None else retain_graph
    found = _run(tuple(outputs), tuple(vectors), retain, create_graph, tuple(wrt), True, accumulate_grad=False)
    return list(found)


def _one(dtype: torch.dtype) -> Tensor:
    if tracing():
        return torch.ones((), dtype=dtype)
    if dtype not in _ones:
        _ones[dtype] = torch.ones((), dtype=dtype)
    return _ones[dtype]
