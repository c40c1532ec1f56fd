"""T1-T2 with a central difference: the DARTS approximation."""

from __future__ import annotations

from nestor.cross import CentralDifference
from nestor.responses.implicit import Implicit
from nestor.solvers import Identity


def FiniteDifference(*, scale: float = 1.0, rel_step: float = 1e-2) -> Implicit:
    r"""T1-T2 with the mixed derivative by a central difference, first derivatives only.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c \approx -\text{scale}\,
        \frac{\nabla_\lambda G(\theta + \varepsilon c) - \nabla_\lambda G(\theta - \varepsilon c)}{2\varepsilon},
        \qquad \varepsilon = \text{rel\_step} / \lVert c \rVert

    Two more forwards and gradients of the lower loss, both with the same random numbers. It does **not** respect
    ``detach()`` inside the lower loss: detached values move with the perturbation (Meta-Weight-Net's weights of
    ``loss.detach()``); use :func:`T1T2` there, which is exact.

    Args:
        scale: Replaces the inverse Hessian: 1.0 (as in DARTS), or the lower learning rate.
        rel_step: Length of the perturbation, in units of the parameters; see :class:`CentralDifference`.

    Raises:
        ValueError: If ``scale`` or ``rel_step`` is not positive and finite.

    Reference: Liu, Simonyan, Yang, DARTS, ICLR 2019, equations 7 and 8.
    """
    label = "FiniteDifference" if scale == 1.0 else f"FiniteDifference(scale={scale:g})"
    return Implicit(solver=Identity(scale=scale), cross=CentralDifference(rel_step=rel_step), label=label)
