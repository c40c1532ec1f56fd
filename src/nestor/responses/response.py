"""The interface of a response, and the best response as a node of the autograd graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestor.autodiff.derivatives import is_final
from nestor.autodiff.instruments import count_response, in_phase
from nestor.autodiff.objective import Objective
from nestor.errors import NestorError, note
from nestor.optim.history_spec import HistorySpec
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.vectors import Params, algebra


class Response(ABC):
    r"""How the levels above differentiate through the best response :math:`\theta^*(\lambda)` of a level.

    Subclasses are frozen dataclasses: their fields are the options, and they have no state.

    Example:
        >>> class HalfStep(nestor.Response):
        ...     def pull_back(self, lower, theta, inputs, cotangent):
        ...         mixed = nestor.ReverseMode().product(lower, theta, inputs, cotangent)
        ...         return [None if m is None else -0.5 * m for m in mixed]
        ...     def describe(self):
        ...         return "HalfStep()"
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, HalfStep())
        >>> torch.autograd.grad(theta, weight)
        (tensor(1.),)
    """

    differentiable: ClassVar[bool] = True
    """Whether the pullback can be non-zero. An upper level without a direct gradient needs such a response."""

    replays_steps: ClassVar[bool] = False
    """Whether the pullback replays all steps since a level above last stepped, or all planned steps."""

    works_on_shards: ClassVar[bool] = True
    """Whether the pullback is right if each process holds a part of every vector (``FullySharded``)."""

    @property
    def differentiates_steps(self) -> bool:
        """Whether the pullback contains a derivative of the level's optimizer step."""
        return self.replays_steps

    is_random: ClassVar[bool] = False
    """Whether two pullbacks of the same cotangent differ."""

    @property
    def differentiates_twice(self) -> bool:
        """Whether the pullback needs second derivatives of the level's loss."""
        return True

    @property
    def assumes_stationarity(self) -> bool:
        """Whether the response is exact only where the gradient of the level vanishes."""
        return False

    @property
    def history_spec(self) -> HistorySpec | None:
        """The part of the level's history that the response needs; None if none."""
        return HistorySpec() if self.replays_steps else None

    def take_planned_steps(self, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Take the planned steps of the level, if there are any and the response needs them.

        By default, a response that replays steps takes them. With any other response, only a level that starts from a
        level above (``Problem(init=...)``) takes its planned steps.

        Args:
            lower: The level.
            theta: Its current variables.
            inputs: The tensors of the levels above.

        Returns:
            The level to pass to ``pull_back``, and its best response.
        """
        if self.replays_steps:
            return lower.with_steps_taken(self.describe(), theta, inputs)
        trajectory = lower.trajectory
        if trajectory is None or not (trajectory.history.planned and trajectory.history.restarts):
            return lower, theta
        trajectory, state = trajectory.taken(inputs)
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

    @property
    def exact_counterpart(self) -> Response | None:
        """The same method with exact derivatives in place of differences; None if it uses no differences."""
        return None

    @property
    def tolerance(self) -> float:
        """The relative error of differences above which a run warns that they do not agree with exact derivatives."""
        return 0.0

    def work(self, steps: int, dimension: int) -> Work:
        """Return how often a pullback evaluates the level, if the level took ``steps`` and has ``dimension`` variables.

        An engine warns of a costly program by it. By default, one gradient is evaluated and differentiated.
        """
        return Work()

    def for_counting(self, dimension: int) -> Response:
        """Return a response that does as many evaluations, on any level, as this one does on a level of ``dimension``.

        ``explain()`` runs it on a small copy of the program. Override it only if the number of evaluations depends on
        the dimension or on values.
        """
        return self


def attach(response: Response, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
    """Make ``theta`` a function of ``inputs``: the same values, whose derivative is the response's.

    Args:
        response: The method.
        lower: The level.
        theta: Its current iterate, used as its best response (a response may take planned steps from there).
        inputs: Tensors that it responds to; those with a graph receive cotangents.

    Returns:
        Views of the best response, attached to ``inputs`` and differentiable to any order that the response supports.
    """
    with torch.no_grad():
        lower, theta = take_planned(response, lower, theta, [i.detach() for i in inputs])
    outputs: tuple[Tensor, ...] = _BestResponse.apply(  # type: ignore[no-untyped-call]
        response, lower, len(theta), *(t.detach() for t in theta), *inputs
    )
    return list(outputs)


def respond_back(
    response: Response, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params
) -> list[Tensor | None]:
    """Call ``response.pull_back``, count the call, and add the name and the loss of the level to its errors.

    Raises:
        NestorError: With the level's name and loss, if the response fails.
        LossError: If an operation of the loss does not have the derivative that the response needs.
    """
    count_response(lower.objective.name)
    try:
        name, loss_scale = lower.objective.name, lower.objective.loss_scale
        if loss_scale is None:
            return in_phase(name, "response", response.pull_back, lower, theta, inputs, cotangent)
        factor = _factor(lower, cotangent, loss_scale)
        cotangent = algebra.scale(factor, cotangent)
        grads = in_phase(name, "response", response.pull_back, lower, theta, inputs, cotangent)
        return [None if g is None else g / factor for g in grads]
    except NestorError as error:
        where = lower.objective.derivatives.where or None
        raise error.located(level=lower.objective.name, where=where) from None
    except (RuntimeError, NotImplementedError) as error:
        _raise_if_missing(response, lower.objective, theta, inputs, error)
        note(error, f"best response of level {lower.objective.name!r}")
        raise
    except Exception as error:
        note(error, f"best response of level {lower.objective.name!r}")
        raise


def take_planned(response: Response, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
    """Call ``response.take_planned_steps``; see :class:`Response`.

    Raises:
        LossError: If an operation of the loss does not have the derivative that the response needs.
    """
    try:
        return response.take_planned_steps(lower, theta, inputs)
    except (RuntimeError, NotImplementedError) as error:
        _raise_if_missing(response, lower.objective, theta, inputs, error)
        raise


def _raise_if_missing(
    response: Response, objective: Objective, theta: Params, inputs: Params, error: Exception
) -> None:
    """Raise a named error if a derivative is missing, and not if the loss itself fails."""
    if not is_final(error) and _has_gradient(objective, theta, inputs):
        raise objective.derivatives.missing_error(objective.name, response.describe(), error) from error


def _has_gradient(objective: Objective, theta: Params, inputs: Params) -> bool:
    """Return whether the objective can be evaluated and differentiated once."""
    leaves, given = algebra.leaves(theta), algebra.leaves(inputs)
    try:
        with torch.enable_grad():
            objective.gradient(leaves, given, [*leaves, *given], create_graph=False)
    except Exception:
        return False
    return bool(objective.terms)


def _factor(lower: LowerLevel, cotangent: Params, loss_scale: Tensor) -> Tensor:
    """Return the factor that scales a cotangent to the range of half precision.

    Responses are linear in the cotangent. A second reverse pass multiplies the cotangent divided by the loss scale,
    forward mode multiplies the cotangent itself: the square root of the loss scale is a compromise.
    """
    length = lower.space.norm([c.detach() for c in cotangent])
    return torch.sqrt(loss_scale) / torch.where(length == 0, 1.0, length)


class _BestResponse(torch.autograd.Function):
    """``(theta, *inputs) -> theta*``; the backward is the pullback, which consists of differentiable operations."""

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
