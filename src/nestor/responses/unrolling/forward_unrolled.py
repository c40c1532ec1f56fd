"""Iterative differentiation in forward mode: for few upper variables and any number of steps."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.derivatives import is_final, reason_of
from nestor.autodiff.forward_mode import DualMode, dual, dual_gradient, load_rules, primal, tangent
from nestor.autodiff.grad import accumulate, vjp
from nestor.autodiff.instruments import count_gradient, count_hvp
from nestor.autodiff.objective import Objective
from nestor.autodiff.scope import Scope
from nestor.errors import NestorError
from nestor.errors.options import check_options
from nestor.optim.state import State
from nestor.responses.response import Response
from nestor.responses.unrolling.step import Step
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.responses.unrolling.unrolled import Unrolled
from nestor.vectors import Params, VectorSpace, algebra


@dataclass(frozen=True, kw_only=True)
class ForwardUnrolled(Response):
    r"""Propagate the tangent of one upper variable at a time forward through the steps.

    .. math:: \dot s_{t+1} = \frac{\partial U}{\partial s}\dot s_t + \frac{\partial U}{\partial\lambda_i}, \qquad
        \Big(\frac{d\theta_T}{d\lambda_i}\Big)^T c = \langle c, \dot\theta_T \rangle

    The result is that of :class:`Unrolled`. The memory does not depend on the number of steps: one state and its
    tangent. Every upper variable costs one more pass through all steps, so the method suits a learning rate, a penalty,
    or a few mixing weights. Steps, batches and random numbers are those of the run, or planned ones without an engine.
    Where forward mode fails (an operation without a forward-mode rule), ``Unrolled(checkpoint="tree")`` replaces it,
    with one warning for each level.

    Args:
        max_inputs: Largest number of upper variables; more raise an error.

    Raises:
        ValueError: If ``max_inputs`` is not positive.

    Reference: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, ICML 2017.

    Example:
        >>> low, rate = nestor.Variable(torch.tensor(0.0)), nestor.Variable(torch.tensor(0.25))
        >>> sgd = torch.optim.SGD(low.parameters(), lr=rate.value)
        >>> fit = nestor.Problem(low, lambda low: (low() - 2) ** 2, optimizer=sgd, response=nestor.ForwardUnrolled())
        >>> program = nestor.Program(low=fit, rate=nestor.Problem(rate, lambda low: (low() - 1) ** 2))
        >>> program.hypergradient("rate")  # after one step, low = 4 rate
        {'value': tensor(0.)}
    """

    replays_steps: ClassVar[bool] = True
    works_on_shards: ClassVar[bool] = False
    max_inputs: int = 32

    def __post_init__(self) -> None:
        check_options(self, counts=["max_inputs"])

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Propagate the tangent of every input; see :class:`Response`."""
        trajectory = lower.needed_trajectory(self.describe())
        if torch.is_grad_enabled():
            given = algebra.fresh(inputs)
            return vjp(trajectory.with_graph(given), given, cotangent, create_graph=True)
        count = algebra.size(inputs)
        if count > self.max_inputs:
            raise NestorError(
                f"ForwardUnrolled would pass {count} times through {len(trajectory.steps)} steps; its limit is "
                f"max_inputs={self.max_inputs}. Use Unrolled(checkpoint='tree') for many upper variables.",
                level=lower.objective.name,
            )
        known = lower.objective.derivatives
        if known.lack(_FORWARD):
            return _IN_REVERSE.pull_back(lower, theta, inputs, cotangent)
        try:
            return self._pushed(lower.space, trajectory, theta, inputs, cotangent)
        except Exception as error:
            if is_final(error):
                raise
            # If the loss itself fails, its error comes again.
            found = _IN_REVERSE.pull_back(lower, theta, inputs, cotangent)
            known.fall_back(lower.objective.name, _FORWARD, _REVERSE, reason_of(error))
            return found

    def _pushed(
        self, space: VectorSpace, trajectory: Trajectory, theta: Params, inputs: Params, cotangent: Params
    ) -> list[Tensor | None]:
        load_rules()
        grads = [torch.zeros_like(i) for i in inputs]
        for place, grad in enumerate(grads):
            for entry in range(grad.numel()):
                direction = [torch.zeros_like(i) for i in inputs]
                direction[place].view(-1)[entry] = 1.0
                moving = _push(trajectory, inputs, direction, theta)
                grad.view(-1)[entry] = space.dot(cotangent, moving)
        if trajectory.history.guard is not None:
            given = [i.detach() for i in trajectory.inputs_then(inputs)]
            trajectory.history.guard.verify(partial(trajectory.replayed_as_taken, given, theta))
        return list(grads)

    def describe(self) -> str:
        return "ForwardUnrolled()"


_IN_REVERSE = Unrolled(checkpoint="tree")
_FORWARD, _REVERSE = "response=ForwardUnrolled()", f"response={_IN_REVERSE.describe()}"


def _push(trajectory: Trajectory, inputs: Params, direction: Params, theta: Params) -> list[Tensor]:
    """Return the tangent of the last variables, ``theta``, for one direction of the inputs."""
    given = [i.detach() for i in trajectory.inputs_then(inputs)]
    state = trajectory.first_state(given)
    moving = [torch.zeros_like(t) for t in state.tensors()]
    if trajectory.init_indices is not None:
        start = [direction[place].expand_as(p) for place, p in zip(trajectory.init_indices, state.params, strict=True)]
        moving[: len(start)] = start
    for step in trajectory.steps:
        state, moving = _push_step(step, state, moving, given, direction)
    if trajectory.history.guard is not None:
        trajectory.history.guard.compare(len(trajectory.steps) - 1, state, State(theta, ()))
    return moving[: len(state.params)]


def _push_step(
    step: Step, state: State, moving: Params, given: Params, direction: Params
) -> tuple[State, list[Tensor]]:
    count_hvp(step.objective.name)
    with forward_ad.dual_level():
        leaves = algebra.leaves(state.params)
        with torch.enable_grad():
            theta = [dual(p, m) for p, m in zip(leaves, moving, strict=False)]
            inputs = [dual(i, d) for i, d in zip(given, direction, strict=True)]
            gradient = _dual_gradient(step.objective, theta, inputs)
        slots = [dual(t.detach(), m) for t, m in zip(state.tensors()[len(theta) :], moving[len(theta) :], strict=True)]
        with torch.no_grad():
            before = state.replace([*(dual(p.detach(), m) for p, m in zip(leaves, moving, strict=False)), *slots])
            after = step.record.update.differentiable_step(before, gradient, step.read(inputs))
            tensors = after.tensors()
            pushed = [tangent(t) for t in tensors]
            return after.replace([primal(t) for t in tensors]), pushed


def _dual_gradient(objective: Objective, theta: Params, inputs: Params) -> list[Tensor | None]:
    """Differentiate the objective at dual numbers; the gradient has tangents."""
    total: list[Tensor | None] = [None] * len(theta)
    for term in objective.terms:
        with Scope(twice=True), DualMode():
            count_gradient(objective.name)
            grads = dual_gradient(term(theta, inputs), theta, objective.loss_scale)
        total = accumulate(total, grads, 1 / len(objective.terms))
    return total
