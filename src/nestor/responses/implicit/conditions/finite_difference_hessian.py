"""Hessian products by differences of gradients."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.instruments import count_hvp
from nestor.responses.implicit.conditions.linearization import Linearization, ResidualFunction
from nestor.responses.implicit.conditions.stationarity import Curvature
from nestor.responses.implicit.cross import CentralDifference
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class FiniteDifferenceHessian(Curvature):
    r"""Difference two gradients: no second derivative of any operator is needed.

    .. math:: H v \approx \frac{\nabla_\theta G(\theta + \varepsilon v)
        - \nabla_\theta G(\theta - \varepsilon v)}{2\varepsilon}, \qquad
        \varepsilon = \text{rel\_step} / \lVert v \rVert

    Each product needs two forwards and two gradients, with one first-order graph in memory at a time. Fused attention
    kernels, compiled modules and operators without a double backward all work. The mixed product is a central
    difference with the same step. The error is of second order in ``rel_step``, plus rounding errors over ``rel_step``;
    a solver cannot reach a smaller residual. The difference does not respect ``detach()`` of values that depend on
    ``theta``.

    Args:
        rel_step: Length of the perturbation, in units of the parameters.

    Raises:
        ValueError: If ``rel_step`` is not positive and finite.
    """

    rel_step: float = 1e-2

    def __post_init__(self) -> None:
        if not (self.rel_step > 0 and math.isfinite(self.rel_step)):
            raise ValueError(f"FiniteDifferenceHessian(rel_step={self.rel_step}) must be positive and finite.")

    def linearize(
        self, residual: ResidualFunction, lower: LowerLevel, theta: Params, inputs: Params, damping: float
    ) -> Linearization:
        """Return the operator; nothing is evaluated yet."""
        return _Differences(residual, lower, theta, inputs, damping, self.rel_step)


class _Differences(Linearization):
    def __init__(
        self,
        residual: ResidualFunction,
        lower: LowerLevel,
        theta: Params,
        inputs: Params,
        damping: float,
        rel_step: float,
    ) -> None:
        super().__init__(residual, lower, theta, inputs, damping, symmetric=True)
        self.rel_step = rel_step

    def apply(self, vector: Params) -> list[Tensor]:
        count_hvp(self.lower.objective.name)
        length = self.space.norm(vector)
        eps = self.rel_step / torch.where(length == 0, 1.0, length)
        inputs = [i.detach() for i in self._inputs]
        sides = []
        for sign in (1.0, -1.0):
            point = algebra.leaves(algebra.axpy(sign * eps, vector, [t.detach() for t in self._theta]))
            with torch.enable_grad():
                grads = self.lower.objective.gradient(point, inputs, point, create_graph=False)
            sides.append(algebra.zeros_for_none(grads, vector))
        product = algebra.scale(0.5 / eps, algebra.subtract(*sides))
        return algebra.axpy(self.damping, vector, product) if self.damping else product

    def apply_many(self, vectors: Params) -> list[Tensor]:
        return self._one_by_one(vectors)

    def pull_back(self, vector: Params) -> list[Tensor | None]:
        """Multiply ``B^T`` onto ``vector`` by a central difference."""
        theta = [t.detach() for t in self._theta]
        with torch.no_grad():
            return CentralDifference(rel_step=self.rel_step).product(self.lower, theta, self._inputs, vector)
