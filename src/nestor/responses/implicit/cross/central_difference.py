"""The cross derivative by a central difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.scalar import read_or_keep, where
from nestor.autodiff.tracing import is_compiling
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.lower_level import LowerLevel
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class CentralDifference(CrossDerivative):
    r"""Difference two gradients at perturbed copies of the lower variables.

    .. math:: \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v \approx
        \frac{\nabla_\lambda G(\theta + \varepsilon v, \lambda) - \nabla_\lambda G(\theta - \varepsilon v, \lambda)}
        {2 \varepsilon}, \qquad \varepsilon = \frac{\text{rel\_step}}{\lVert v \rVert}

    First derivatives only: two forwards and two gradients, no second derivative of any operator, any attention kernel.
    Of a large level both sides are formed in the same memory, in an engine that of the vector.
    Both sides see the same random numbers. The error is of second order in ``rel_step``, plus rounding over
    ``rel_step``.

    It does **not** respect ``detach()``: a value that the loss detaches (``weights(losses.detach())`` in
    Meta-Weight-Net) moves with the perturbed variables too, so the result is the mixed derivative of the loss
    *without* the ``detach``. Use :class:`ForwardMode` or :class:`ReverseMode` there.

    Args:
        rel_step: Length of the perturbation :math:`\varepsilon \lVert v \rVert`, in units of the parameters.

    Raises:
        ValueError: If ``rel_step`` is not positive and finite.

    Reference: Liu, Simonyan, Yang, DARTS, ICLR 2019, equation 8.
    """

    rel_step: float = 1e-2

    def __post_init__(self) -> None:
        if not (self.rel_step > 0 and math.isfinite(self.rel_step)):
            raise ValueError(f"CentralDifference(rel_step={self.rel_step}) must be positive and finite.")

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by a central difference; see :class:`CrossDerivative`."""
        create_graph = torch.is_grad_enabled()
        length = read_or_keep(algebra.norm(vector).detach())
        # A zero vector moves nothing: any step gives the right product, which is zero.
        eps = self.rel_step / where(length == 0, 1.0, length)
        with torch.enable_grad():
            inputs = algebra.fresh(inputs) if create_graph else algebra.leaves(inputs)
            if create_graph or is_compiling() or not algebra.is_large(theta):
                above = lower.gradient(moved(theta, eps, vector), inputs, inputs, create_graph=create_graph)
                below = lower.gradient(moved(theta, -eps, vector), inputs, inputs, create_graph=create_graph)
            else:
                point = moved(theta, eps, vector, once=lower.once)
                above = lower.gradient(point, inputs, inputs, create_graph=False)
                # In the same memory: that of a large model is slow to get. A gradient may be a part of the point.
                held = {id(p.untyped_storage()) for p in point}
                above = [g.clone() if g is not None and id(g.untyped_storage()) in held else g for g in above]
                algebra.mirror(point, theta)
                below = lower.gradient(point, inputs, inputs, create_graph=False)
            factor = 0.5 / eps
            return [
                None if plus is None or minus is None else (plus - minus) * factor
                for plus, minus in zip(above, below, strict=True)
            ]


def moved(theta: Params, eps: float | Tensor, vector: Params, *, once: bool = False) -> list[Tensor]:
    """Return ``theta + eps * vector``, which requires gradients: by that losses choose what they decay.

    If the vector is used this ``once``, each part of it is let go of when its part of the result is there.
    """
    if once:
        parts = zip(theta, algebra.drain(vector), strict=True)
        return [algebra.axpy(eps, [v], [t])[0].requires_grad_() for t, v in parts]
    return [p.requires_grad_() for p in algebra.axpy(eps, vector, theta)]
