"""The fixed point of the level's own optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.grad import accumulate, grad, vjp
from nestor.autodiff.scope import enclosed
from nestor.errors import NestorError
from nestor.optim.history_spec import HistorySpec
from nestor.optim.state import State
from nestor.optim.update import Update
from nestor.responses.implicit.conditions.condition import Condition
from nestor.responses.implicit.cross import CheapestExact, CrossDerivative
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.vectors import Params, algebra, split


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Condition):
    r"""The condition :math:`r = \theta - \text{Step}(\theta, \nabla_\theta G(\theta, \lambda)) = 0`.

    ``Step`` is one step of the level's own optimizer, by :func:`nestor.optim.functional_step`, with the optimizer state
    (momentum, second moments, counters) before the last step. The matrix is

    .. math:: A = I - \frac{\partial\text{Step}}{\partial\theta} + D H, \qquad
        \frac{\partial r}{\partial\lambda} = D\, \frac{\partial^2 G}{\partial\theta\,\partial\lambda}, \qquad
        D = -\frac{\partial\text{Step}}{\partial g}

    The preconditioner ``D`` is evaluated at the gradient of the last step (the current gradient if no step is
    recorded). It includes bias correction, coupled decay and amsgrad. The matrix is not symmetric: solve with
    ``GMRES``, ``BiCGSTAB`` or ``DenseSolve``.

    Reference: Choe et al., Making scalable meta learning practical, NeurIPS 2023, section 3.2.

    Example:
        >>> theta, weight = torch.nn.Parameter(torch.tensor(2.0)), torch.tensor(2.0, requires_grad=True)
        >>> adam = torch.optim.Adam([theta], lr=0.1)
        >>> response = nestor.Implicit(solver=nestor.GMRES(), condition=nestor.FixedPoint())
        >>> best = nestor.best_response(lambda t, w: (t - w) ** 2, theta, weight, response, optimizer=adam)
        >>> torch.autograd.grad(best, weight)
        (tensor(1.),)
    """

    symmetric: ClassVar[bool] = False
    differentiates_steps: ClassVar[bool] = True

    @property
    def history_spec(self) -> HistorySpec:
        """The last step, its gradient, and the state before it."""
        return HistorySpec(window=1, spacing=1, gradients=True)

    @property
    def mixed_history_spec(self) -> HistorySpec:
        """The last step and its gradient; for most rules, the optimizer's memory after the step determines ``D``."""
        return HistorySpec(window=1, spacing=1, gradients=True, slots_after=True)

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the gradient of the lower objective and one optimizer step, with a graph."""
        trajectory = _trajectory(lower)
        gradient = lower.objective.gradient(theta, inputs, theta, create_graph=True)
        state = State(theta, trajectory.last_state().slots)
        after = trajectory.rule.differentiable_step(state, gradient, trajectory.steps[-1].read(inputs))
        return algebra.subtract(theta, after.params)

    def mixed_product(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params, cross: CrossDerivative | None
    ) -> list[Tensor | None]:
        """Pull the vector back through the optimizer step, then multiply the mixed derivative of the objective."""
        trajectory = _trajectory(lower)
        create_graph = torch.is_grad_enabled()
        # The product is B^T v with B = D (d^2 G / dtheta dlambda): first D^T v, then the mixed derivative of G.
        if trajectory.history.slots_after is not None:
            preconditioned = _by_step_jacobian(trajectory, theta, vector, may_overwrite=lower.may_overwrite)
            return (cross or CheapestExact()).product(lower, theta, inputs, preconditioned)
        if create_graph and cross is None:
            # For a higher derivative, D must be a function of theta and the inputs: differentiate the residual.
            return super().mixed_product(lower, theta, inputs, vector, None)
        gradient = _last_gradient(trajectory, lower, theta, inputs)
        state = trajectory.last_state()
        before = State(theta if trajectory.history.planned else state.params, state.slots)
        direct: list[Tensor | None] = [None] * len(inputs)
        if not create_graph and trajectory.rule.is_separable:
            # One variable at a time: the graph of the rule needs the memory of about ten vectors.
            pulled = [
                _through_one(trajectory.rule, index, before, g, v)
                for index, (g, v) in enumerate(zip(gradient, vector, strict=True))
            ]
        else:
            pulled, direct = _through_step(trajectory, before, gradient, inputs, vector)
        # D = -dStep/dg, hence the sign. ``direct`` is the part through hyperparameters that are inputs.
        filled = algebra.zeros_for_none(algebra.negative(pulled), theta)
        del pulled
        product = (cross or CheapestExact()).product(lower, theta, inputs, filled)
        return accumulate(algebra.negative(direct), product)


def _by_step_jacobian(trajectory: Trajectory, theta: Params, vector: Params, *, may_overwrite: bool) -> list[Tensor]:
    """Multiply ``D`` onto the vector, by the optimizer's memory after the step.

    With ``may_overwrite``, each entry of the gradient and of the vector is freed after use.
    """
    gradient, slots = trajectory.history.gradients[-1], trajectory.history.slots_after
    assert slots is not None
    if len(gradient) != len(theta):
        raise NestorError(
            "The level above has freed the gradient of the level's last step. If a callback evaluates hypergradients, "
            "call run.keep_histories() in its on_start."
        )
    pairs = zip(
        algebra.consume(gradient, may_overwrite=may_overwrite),
        algebra.consume(vector, may_overwrite=may_overwrite),
        strict=True,
    )
    return [
        torch.zeros_like(v) if g is None else trajectory.rule.apply_step_jacobian(index, g, v, slots[index])
        for index, (g, v) in enumerate(pairs)
    ]


def _last_gradient(trajectory: Trajectory, lower: LowerLevel, theta: Params, inputs: Params) -> Sequence[Tensor | None]:
    """Return the gradient of the last step; the current gradient if no gradient is recorded."""
    if trajectory.history.gradients:
        return trajectory.history.gradients[-1]
    point = algebra.leaves(theta)
    with torch.enable_grad():
        return lower.objective.gradient(point, [i.detach() for i in inputs], point, create_graph=False)


def _through_one(rule: Update, index: int, before: State, gradient: Tensor | None, vector: Tensor) -> Tensor | None:
    """Pull a vector back through the step of one variable, to its gradient."""
    if gradient is None:
        return None
    with torch.enable_grad():
        probe = gradient.detach().requires_grad_()
        state = State([before.params[index].detach()], [before.slots[index]])
        after = rule.only(index).differentiable_step(state, [probe], {})
        return grad(after.params, [probe], [vector])[0]


def _through_step(
    trajectory: Trajectory, before: State, gradient: Sequence[Tensor | None], inputs: Params, vector: Params
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Pull a vector back through the optimizer step, to its gradient and to the inputs."""
    create_graph = torch.is_grad_enabled()
    present = algebra.present(gradient)

    def product(tensors: list[Tensor]) -> list[Tensor | None]:
        probes, given, direction = split(tensors, [len(present), len(inputs), len(vector)])
        values = iter(probes)
        probe = [None if g is None else next(values) for g in gradient]
        state = State([b.detach() for b in before.params], before.slots)
        after = trajectory.rule.differentiable_step(state, probe, trajectory.steps[-1].read(given))
        return vjp(after.params, [*probes, *given], direction, create_graph=create_graph)

    found = enclosed(product, [*(g.detach() for g in present), *inputs, *vector])
    through = iter(found[: len(present)])
    return [None if g is None else next(through) for g in gradient], found[len(present) :]


def _trajectory(lower: LowerLevel) -> Trajectory:
    if lower.trajectory is None:
        raise NestorError(
            "FixedPoint() needs the level's optimizer, and none is known. In a program, give the level an optimizer; "
            "with best_response, pass optimizer=torch.optim.Adam([theta], lr=...).",
            level=lower.objective.name,
        )
    return lower.trajectory
