"""T1-T2 with a central difference: the DARTS approximation."""

from __future__ import annotations

from nestor.responses.implicit.cross import CentralDifference, ReusedDifference
from nestor.responses.implicit.implicit import Implicit
from nestor.solvers import Identity


def FiniteDifference(*, scale: float = 1.0, rel_step: float = 1e-2, reuse: bool = False) -> Implicit:
    r"""T1-T2 with the mixed derivative by a central difference, first derivatives only.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c \approx -\text{scale}\,
        \frac{\nabla_\lambda G(\theta + \varepsilon c) - \nabla_\lambda G(\theta - \varepsilon c)}{2\varepsilon},
        \qquad \varepsilon = \text{rel\_step} / \lVert c \rVert

    Two more forwards and gradients of the lower loss, both with the same random numbers. It does **not** respect
    ``detach()`` inside the lower loss: detached values move with the perturbation (Meta-Weight-Net's weights of
    ``loss.detach()``); use :func:`T1T2` there, which is exact.

    Args:
        scale: Replaces the inverse Hessian: 1.0 (as in DARTS), or the lower learning rate.
        reuse: Difference from the gradient that the lower level's last step took, whose part in the upper variables
            comes with its own backward: one more forward and gradient, not two. The error is then of first order in
            ``rel_step`` and the point is that before the last step; see :class:`ReusedDifference`.
        rel_step: Length of the perturbation, in units of the parameters; see :class:`CentralDifference`.

    Raises:
        ValueError: If ``scale`` or ``rel_step`` is not positive and finite.

    Reference: Liu, Simonyan, Yang, DARTS, ICLR 2019, equations 7 and 8.
    """
    label = "FiniteDifference" if scale == 1.0 else f"FiniteDifference(scale={scale:g})"
    cross = ReusedDifference(rel_step=rel_step) if reuse else CentralDifference(rel_step=rel_step)
    return Implicit(solver=Identity(scale=scale), cross=cross, label=f"{label}, reused" if reuse else label)
