"""T1-T2: the identity for the inverse Hessian, the mixed derivative exactly."""

from __future__ import annotations

from nestor.cross import CrossDerivative
from nestor.responses.implicit import Implicit
from nestor.solvers import Identity


def T1T2(*, scale: float = 1.0, cross: CrossDerivative | None = None) -> Implicit:  # noqa: N802, a paper's name
    r"""T1-T2, the default response: :math:`(d\theta^*/d\lambda)^T c \approx -\text{scale} \cdot
    \frac{\partial^2 G}{\partial\lambda\,\partial\theta} c`.

    One more forward and gradient of the lower loss; no solve, no step size, right with dropout and ``detach()``. A
    descent direction rather than a gradient, but for the scale the gradient through the last lower SGD step: with
    ``scale`` equal to that step's learning rate it is exactly that (evaluated at the new point).

    Args:
        scale: Replaces the inverse Hessian: 1.0, or the lower learning rate. See :class:`Identity`.
        cross: How the mixed derivative is computed; ``None`` takes the cheapest exact way.

    Raises:
        ValueError: If ``scale`` is not positive and finite.

    Reference: Luketina, Berglund, Greff, Raiko, Scalable gradient-based tuning of continuous regularization
    hyperparameters, ICML 2016.
    """
    return Implicit(solver=Identity(scale=scale), cross=cross)
