"""The interface of a response, and the best response as a node of the autograd graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import count_response, phase
from nestor.errors import NestorError
from nestor.optim.history import HistorySpec
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra


class Response(ABC):
    r"""How the levels above differentiate through the best response :math:`\theta^*(\lambda)` of a level.

    A frozen dataclass whose fields are the options; it keeps no state.
    """

    differentiable: ClassVar[bool] = True
    """Whether its pullback can be non-zero: an upper level that has no other gradient needs that."""

    @property
    def assumes_stationarity(self) -> bool:
        """Whether the response is exact only where the gradient of the level vanishes."""
        return False

    @property
    def history_spec(self) -> HistorySpec | None:
        """What is kept of the level's steps; None if nothing."""
        return None

    def take_planned_steps(self, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Go to the point at which the response is taken, if steps of the level are planned.

        By default, only a level that starts from a level above (``Problem(init=...)``) takes its planned steps.

        Args:
            lower: The level.
            theta: Its present variables.
            inputs: The tensors of the levels above.

        Returns:
            The level, as ``pull_back`` will see it, and its best response.
        """
        if lower.init_indices is None or lower.trajectory is None or not lower.trajectory.history.planned:
            return lower, theta
        trajectory, state = lower.trajectory.taken(inputs)
        return replace(lower, trajectory=trajectory), state.params

    @abstractmethod
    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        r"""Map a cotangent on the best response to cotangents on its inputs, :math:`(d\theta^*/d\lambda)^T c`.

        If gradients are enabled when this is called, the result is differentiable again, in all three arguments.

        Args:
            lower: The level.
            theta: Its best response; each tensor any shape.
            inputs: The tensors of the levels above that it responds to.
            cotangent: ``c``, a vector like ``theta``.

        Returns:
            A vector like ``inputs``; None for a tensor that the level does not respond to.
        """

    @abstractmethod
    def describe(self) -> str:
        """Name the method and its options in a few words, for tables."""

    def for_counting(self, dimension: int) -> Response:
        """Return a method that does the evaluations of this one for a level of ``dimension``, on a level of any size.

        ``explain()`` runs it on a miniature of the program. Only a method whose work depends on the numbers needs its
        own.
        """
        return self


def attach(response: Response, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
    """Make ``theta`` a function of ``inputs``: the same values, whose derivative is the response's.

    Args:
        response: The method.
        lower: The level.
        theta: Its current iterate, taken as its best response (a response may take planned steps from there).
        inputs: Tensors that it responds to; those that carry a graph receive cotangents.

    Returns:
        Views of the best response, attached to ``inputs`` and differentiable to any order that the response supports.
    """
    with torch.no_grad():
        lower, theta = response.take_planned_steps(lower, theta, [i.detach() for i in inputs])
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
    count_response(lower.objective.name)
    try:
        factor = _factor(lower, cotangent)
        if factor is not None:
            cotangent = algebra.scale(factor, cotangent)
        with phase(lower.objective.name, "response"):
            grads = response.pull_back(lower, theta, inputs, cotangent)
        return grads if factor is None else [None if g is None else g / factor for g in grads]
    except NestorError as error:
        raise error.located(level=lower.objective.name) from None


def _factor(lower: LowerLevel, cotangent: Params) -> Tensor | None:
    """Bring a cotangent to a length that half precision can carry; responses are linear in it.

    A second derivative meets it divided by the loss scale, and forward mode as it is: the square root lies between.
    """
    if lower.objective.loss_scale is None:
        return None
    length = lower.space.norm([c.detach() for c in cotangent])
    return torch.sqrt(lower.objective.loss_scale) / torch.where(length == 0, 1.0, length)


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


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Response):
    r"""Take :math:`d\theta^*/d\lambda = 0`: the level is a constant for the levels above, which keep their direct term.

    A level that starts from another one's variables (``Problem(init=...)``) hands its cotangent on to them as it is:
    first-order MAML. An upper level whose loss does not read its own variables gets no gradient from it, which
    ``Program`` reports.

    Reference: Finn, Abbeel, Levine, Model-agnostic meta-learning, ICML 2017, section 5.2.
    """

    differentiable: ClassVar[bool] = False

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Return zero, except for the variables that the level started from."""
        grads: list[Tensor | None] = [None] * len(inputs)
        if lower.init_indices is not None:
            # Tasks that start from the same variables add up.
            for place, value in zip(lower.init_indices, cotangent, strict=True):
                grads[place] = value.sum_to_size(inputs[place].shape)
        return grads

    def describe(self) -> str:
        """Name the method."""
        return "FirstOrder"
