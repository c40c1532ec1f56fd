"""The fixed point of the level's own optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestor.autodiff.grad import grad
from nestor.errors import NestorError
from nestor.optim.recording import Recording
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, Update
from nestor.responses.implicit.conditions.condition import Condition
from nestor.responses.implicit.cross import CrossDerivative, cheapest_exact
from nestor.responses.lower_level import LowerLevel, pull_back
from nestor.responses.unrolling.trajectory import Trajectory
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Condition):
    r"""The condition :math:`r = \theta - \text{Step}(\theta, \nabla_\theta G(\theta, \lambda)) = 0`.

    ``Step`` is one step of the level's own optimizer, through :func:`nestor.optim.functional_step`, with the state
    (momentum, second moments, counters) that it had before its last step. Its matrix is

    .. math:: A = I - \frac{\partial\text{Step}}{\partial\theta} + D H, \qquad
        \frac{\partial r}{\partial\lambda} = D\, \frac{\partial^2 G}{\partial\theta\,\partial\lambda}, \qquad
        D = -\frac{\partial\text{Step}}{\partial g}

    for a preconditioner ``D`` taken at the optimizer's last gradient (the present one, where no step was noted): bias
    correction, coupled decay and amsgrad included. Not symmetric: solve with ``GMRES``, ``BiCGSTAB`` or ``DenseSolve``.

    Reference: Choe et al., Making scalable meta learning practical, NeurIPS 2023, section 3.2.
    """

    symmetric: ClassVar[bool] = False

    @property
    def recording(self) -> Recording:
        """The last step, its gradient, and the state before it."""
        return Recording(window=1, spacing=1, gradient=True)

    @property
    def mixed_recording(self) -> Recording:
        """The last step and its gradient: of most rules, what the optimizer keeps after the step tells ``D``."""
        return Recording(window=1, spacing=1, gradient=True, after=True)

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the gradient of the lower objective and one optimizer step, with a graph."""
        trajectory, state = _last(lower)
        step = trajectory.steps[-1]
        gradient = lower.gradient(theta, inputs, theta, create_graph=True)
        after = step.update.linked(State(theta, state.slots), gradient, step.named(inputs))
        return algebra.subtract(theta, after.params)

    def mixed_product(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params, cross: CrossDerivative | None
    ) -> list[Tensor | None]:
        """Pull the vector back through the optimizer step, then multiply the mixed derivative of the objective."""
        if lower.trajectory is not None and lower.trajectory.after is not None:
            sloped = _sloped(lower.trajectory, theta, vector, once=lower.once)
            return (cross or cheapest_exact(lower, theta)).product(lower, theta, inputs, sloped)
        trajectory, state = _last(lower)
        step = trajectory.steps[-1]
        create_graph = torch.is_grad_enabled()
        if create_graph and cross is None:
            return super().mixed_product(lower, theta, inputs, vector, None)
        gradient: Sequence[Tensor | None] | None = trajectory.gradients[-1] if trajectory.gradients else None
        if gradient is None:
            with torch.enable_grad():
                point = algebra.leaves(theta)
                gradient = lower.gradient(point, [i.detach() for i in inputs], point, create_graph=False)
        before = theta if trajectory.ahead else state.params
        rule = step.update
        if not create_graph and isinstance(rule, OptimizerUpdate) and rule.is_separable:
            # One variable after the other: the graph of the rule is as large as some ten vectors.
            pulled = [
                _pulled(rule.only(place), before[place], state.slots[place], g, v)
                for place, (g, v) in enumerate(zip(gradient, vector, strict=True))
            ]
            filled = algebra.zeros_for_none(algebra.negative(pulled), theta)
            del pulled
            return (cross or cheapest_exact(lower, theta)).product(lower, theta, inputs, filled)
        with torch.enable_grad():
            probe: Sequence[Tensor | None] = [None if g is None else g.detach().requires_grad_() for g in gradient]
            given = algebra.fresh(inputs)
            present = [p for p in probe if p is not None]
            after = step.update.linked(State([b.detach() for b in before], state.slots), probe, step.named(given))
            pulled = pull_back(after.params, [*present, *given], vector, create_graph=create_graph)
        through = iter(pulled[: len(present)])
        direct = algebra.negative(pulled[len(present) :])
        preconditioned = [None if p is None else next(through) for p in probe]
        filled = algebra.zeros_for_none(algebra.negative(preconditioned), theta)
        product = (cross or cheapest_exact(lower, theta)).product(lower, theta, inputs, filled)
        return algebra.accumulate(direct, product)


def _sloped(trajectory: Trajectory, theta: Params, vector: Params, *, once: bool) -> list[Tensor]:
    """Multiply ``D`` onto the vector, from what the optimizer keeps after the step.

    With ``once``, the gradient and the vector are freed parameter by parameter.
    """
    rule, gradient = trajectory.steps[-1].update, trajectory.gradients[-1]
    assert isinstance(rule, OptimizerUpdate)
    assert trajectory.after is not None
    if len(gradient) != len(theta):
        raise NestorError(
            "The level above has already freed the gradient of the level's last step. A callback that evaluates "
            "hypergradients must call run.keep_histories() in on_start."
        )
    pairs = zip(gradient, vector, strict=True)
    if once:
        pairs = zip(algebra.drain(gradient), algebra.drain(vector), strict=True)
    return [
        torch.zeros_like(v) if g is None else rule.sloped(place, g, v, trajectory.after[place])
        for place, (g, v) in enumerate(pairs)
    ]


def _pulled(
    rule: Update, theta: Tensor, slot: Mapping[str, Any], gradient: Tensor | None, vector: Tensor
) -> Tensor | None:
    """Pull a vector back through the step of one variable, to its gradient."""
    if gradient is None:
        return None
    with torch.enable_grad():
        probe = gradient.detach().requires_grad_()
        after = rule.linked(State([theta.detach()], [slot]), [probe], {})
        return grad(after.params, [probe], [vector])[0]


def _last(lower: LowerLevel) -> tuple[Trajectory, State]:
    """Find the last step, and the state before it."""
    if lower.trajectory is None:
        raise NestorError(
            "FixedPoint() needs the level's optimizer, and none is known. In a program, give the level an optimizer; "
            "with best_response, pass optimizer=torch.optim.Adam([theta], lr=...).",
            level=lower.name,
        )
    trajectory = lower.trajectory
    return trajectory, trajectory.states[max(trajectory.states)]()
