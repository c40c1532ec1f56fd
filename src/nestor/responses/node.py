"""The best response as a node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.counters import count_response
from nestor.autodiff.profiling import phase
from nestor.errors import NestorError
from nestor.responses.lower_level import LowerLevel
from nestor.responses.response import Response
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


def attach(response: Response, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
    """Make ``theta`` a function of ``inputs``: the same values, whose derivative is the response's.

    Args:
        response: The method.
        lower: The level.
        theta: Its current iterate, taken as its best response (a response may go on from there).
        inputs: Tensors that it responds to; those that carry a graph receive cotangents.

    Returns:
        Views of the best response, attached to ``inputs`` and differentiable to any order that the response supports.
    """
    with torch.no_grad():
        lower, theta = response.reach(lower, theta, [i.detach() for i in inputs])
    outputs: tuple[Tensor, ...] = _BestResponse.apply(  # type: ignore[no-untyped-call]
        response, lower, len(theta), *(t.detach() for t in theta), *inputs
    )
    return list(outputs)


def respond_back(
    response: Response, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params
) -> list[Tensor | None]:
    """Map a cotangent on the best response to cotangents on its inputs: ``Response.pull_back``, counted and located.

    Raises:
        NestorError: With the level's name, if the response fails.
    """
    count_response(lower.name)
    try:
        factor = _factor(lower, cotangent)
        if factor is not None:
            cotangent = algebra.scale(factor, cotangent)
        with phase(lower.name, "response"):
            grads = response.pull_back(lower, theta, inputs, cotangent)
        return grads if factor is None else [None if g is None else g / factor for g in grads]
    except NestorError as error:
        raise error.located(level=lower.name) from None


def _factor(lower: LowerLevel, cotangent: Params) -> Tensor | None:
    """Bring a cotangent to a length that half precision can carry; responses are linear in it.

    A second derivative meets it divided by the loss scale, and forward mode as it is: the square root lies between.
    """
    if lower.loss_scale is None:
        return None
    length = lower.space.norm([c.detach() for c in cotangent])
    return torch.sqrt(lower.loss_scale) / torch.where(length == 0, 1.0, length)


class _BestResponse(torch.autograd.Function):
    """``(theta, *inputs) -> theta*``; its backward is the pullback, made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, response: Response, lower: LowerLevel, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(t.view_as(t) for t in tensors[:count])
        ctx.response, ctx.lower, ctx.count = response, lower, count
        # The outputs are saved, not the arguments: in a second derivative they lead back to this node.
        ctx.save_for_backward(*outputs, *tensors[count:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        theta, inputs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        grads = respond_back(ctx.response, ctx.lower, theta, inputs, cotangent)
        return (None, None, None, *(None for _ in theta), *grads)
