"""The cross derivative by a forward difference from the lower step's own gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.scalar import read_or_keep, where
from nestor.optim.recording import Recording
from nestor.responses.implicit.cross.central_difference import CentralDifference, moved
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.lower_level import LowerLevel
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class ReusedDifference(CrossDerivative):
    r"""Difference one gradient at a perturbed point from the one that the lower level's last step took.

    .. math:: \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v \approx
        \frac{\nabla_\lambda G(\theta_{T-1} + \varepsilon v, \lambda) - \nabla_\lambda G(\theta_{T-1}, \lambda)}
        {\varepsilon}, \qquad \varepsilon = \frac{\text{rel\_step}}{\lVert v \rVert}

    The gradient in the upper variables comes with the backward of the lower step itself, on the same batch and random
    numbers, so one more forward and gradient are enough. What it gives up against :class:`CentralDifference`: the error
    is of first order in ``rel_step``, and the derivative is taken at the variables *before* the last step, of which a
    copy is kept. Outside an engine, and for a level whose objective contains best responses, it is the central
    difference.

    Args:
        rel_step: Length of the perturbation, in units of the parameters.

    Raises:
        ValueError: If ``rel_step`` is not positive and finite.
    """

    rel_step: float = 1e-2

    def __post_init__(self) -> None:
        if not (self.rel_step > 0 and math.isfinite(self.rel_step)):
            raise ValueError(f"ReusedDifference(rel_step={self.rel_step}) must be positive and finite.")

    @property
    def recording(self) -> Recording:
        """The variables before the last step, and its gradient in the upper variables."""
        return Recording(window=1, spacing=1, inputs=True, slots=False)

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by a forward difference; see :class:`CrossDerivative`."""
        trajectory = lower.trajectory
        base: Sequence[Tensor | None] = trajectory.input_gradient if trajectory is not None else ()
        if trajectory is None or not base or torch.is_grad_enabled():
            return CentralDifference(rel_step=self.rel_step).product(lower, theta, inputs, vector)
        length = read_or_keep(algebra.norm(vector))
        eps = self.rel_step / where(length == 0, 1.0, length)
        before = trajectory.states[max(trajectory.states)]().params
        leaves = algebra.leaves(inputs)
        with torch.enable_grad():
            there = lower.gradient(moved(before, eps, vector, once=lower.once), leaves, leaves, create_graph=False)
        return [None if t is None or b is None else (t - b) / eps for t, b in zip(there, base, strict=True)]
