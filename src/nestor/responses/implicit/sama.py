"""SAMA: the identity for the inverse, on the fixed point of the level's own optimizer."""

from __future__ import annotations

from nestor.responses.implicit.conditions import FixedPoint
from nestor.responses.implicit.cross import CentralDifference, CrossDerivative
from nestor.responses.implicit.implicit import Implicit
from nestor.solvers import Identity


def SAMA(*, scale: float = 1.0, rel_step: float = 1e-2, cross: CrossDerivative | None = None) -> Implicit:
    r"""SAMA: the identity for the inverse, on the fixed point of the level's own optimizer.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c \approx -\text{scale}\,
        \frac{\partial^2 G}{\partial\lambda\,\partial\theta} D^T c, \qquad
        D = -\frac{\partial\text{Step}(\theta, g)}{\partial g}

    The preconditioner ``D`` is one VJP of the optimizer's last step, so it is exact for **every** differentiable
    optimizer, bias correction, decay and amsgrad included; for SGD it is the learning rate. The mixed derivative by a
    central difference: two more forwards and gradients, first derivatives only. A descent direction rather than a
    gradient.

    In an engine, ``D`` of SGD, Adam, AdamW, RMSprop and Adagrad is read off what the optimizer keeps after the step,
    where decay is not a part of the gradient: beside that it takes two vectors, the gradient and the cotangent.

    Args:
        scale: Replaces the inverse of the fixed point's matrix.
        rel_step: Length of the perturbation of the central difference, in units of the parameters.
        cross: Another way to compute the mixed derivative, such as the exact ``ForwardMode()``, which respects
            ``detach()``; ``rel_step`` then has nothing to say.

    Raises:
        ValueError: If ``scale`` or ``rel_step`` is not positive and finite.

    Reference: Choe et al., Making scalable meta learning practical, NeurIPS 2023, equations 4 to 6.
    """
    return Implicit(
        solver=Identity(scale=scale),
        condition=FixedPoint(),
        cross=CentralDifference(rel_step=rel_step) if cross is None else cross,
        label="SAMA" if scale == 1.0 else f"SAMA(scale={scale:g})",
    )
