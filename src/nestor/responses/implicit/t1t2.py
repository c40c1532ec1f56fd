"""T1-T2: the identity for the inverse Hessian, the mixed derivative exactly."""

from __future__ import annotations

from nestor.responses.implicit.cross import CrossDerivative
from nestor.responses.implicit.implicit import Implicit
from nestor.solvers import Identity


def T1T2(*, scale: float = 1.0, cross: CrossDerivative | None = None) -> Implicit:
    r"""T1-T2, the default response: the identity for the inverse Hessian, the mixed derivative exactly.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c
        \approx -\text{scale} \cdot \frac{\partial^2 G}{\partial\lambda\,\partial\theta} c

    One more forward and gradient of the lower loss; no solve, no step size, right with dropout and ``detach()``. A
    descent direction rather than a gradient: with ``scale`` equal to the learning rate it is the gradient through one
    lower SGD step from the present parameters.

    Args:
        scale: Replaces the inverse Hessian: 1.0, or the lower learning rate. See :class:`Identity`.
        cross: How the mixed derivative is computed; ``None`` takes the cheapest exact way.

    Raises:
        ValueError: If ``scale`` is not positive and finite.

    Reference: Luketina, Berglund, Greff, Raiko, Scalable gradient-based tuning of continuous regularization
    hyperparameters, ICML 2016.
    """
    label = "T1T2" if scale == 1.0 else f"T1T2(scale={scale:g})"
    return Implicit(solver=Identity(scale=scale), cross=cross, label=label)
