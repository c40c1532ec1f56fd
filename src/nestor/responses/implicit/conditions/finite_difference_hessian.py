"""Hessian products by differences of gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import count_hvp
from nestor.errors.options import check_options
from nestor.responses.implicit.conditions.linearization import Linearization
from nestor.responses.implicit.conditions.stationarity import Curvature
from nestor.responses.implicit.cross import CentralDifference
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

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> condition = nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian())
        >>> response = nestor.Implicit(solver=nestor.ConjugateGradient(rtol=1e-3), condition=condition)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> (slope,) = torch.autograd.grad(theta, weight)
        >>> print(f"{slope:.3f}")
        1.000
    """

    differentiates_twice: ClassVar[bool] = False
    rel_step: float = 1e-2

    def __post_init__(self) -> None:
        check_options(self, positive=["rel_step"])

    def operator(self, hessian: Linearization) -> Linearization:
        """Return the operator; nothing is evaluated yet."""
        return _Differences(*hessian.point, rel_step=self.rel_step)


@dataclass(eq=False, kw_only=True)
class _Differences(Linearization):
    has_batched_product = False
    rel_step: float

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
        return self._damped(algebra.scale(0.5 / eps, algebra.subtract(*sides)), vector)

    def pull_back(self, vector: Params) -> list[Tensor | None]:
        """Multiply ``B^T`` onto ``vector`` by a central difference."""
        theta = [t.detach() for t in self._theta]
        with torch.no_grad():
            return CentralDifference(rel_step=self.rel_step).product(self.lower, theta, self._inputs, vector)
