"""Methods of the literature, each one expression over :class:`Implicit`."""

from nestor.errors.options import typed
from nestor.responses.implicit.conditions import FixedPoint
from nestor.responses.implicit.cross import CentralDifference, CrossDerivative, ReusedDifference, ReusedGraph
from nestor.responses.implicit.implicit import Implicit
from nestor.responses.implicit.printing import named
from nestor.solvers import Identity


@typed
def T1T2(*, scale: float = 1.0, reuse: bool = False, cross: CrossDerivative | None = None) -> Implicit:
    r"""T1-T2, the default response: the identity for the inverse Hessian, the mixed derivative exactly.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c
        \approx -\text{scale} \cdot \frac{\partial^2 G}{\partial\lambda\,\partial\theta} c

    It needs one more forward and gradient of the lower loss, no solve, and no step size. It is correct with dropout and
    ``detach()``. The result is a descent direction rather than the gradient. With ``scale`` equal to the learning rate,
    it is the gradient through one lower SGD step from the current parameters.

    Args:
        scale: Replaces the inverse Hessian: 1.0, or the lower learning rate. See :class:`Identity`.
        reuse: Take the mixed derivative at the point of the lower level's last step, from the graph of that step, as in
            the original method: one reverse pass, no evaluation; see :class:`ReusedGraph`. Otherwise the point is the
            present one, after the step.
        cross: How the mixed derivative is computed; ``None`` uses the cheapest exact method.

    Raises:
        ValueError: If ``scale`` is not positive and finite, or ``reuse`` and ``cross`` are both given.

    Reference: Luketina, Berglund, Greff, Raiko, Scalable gradient-based tuning of continuous regularization
    hyperparameters, ICML 2016.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, nestor.T1T2(scale=0.5))
        >>> torch.autograd.grad(theta**3, weight)  # exact here, because the Hessian is 1 / scale
        (tensor(12.),)
    """
    if reuse and cross is not None:
        raise ValueError(f"T1T2(reuse=True, cross={cross!r}): the reused graph is the cross derivative. Give one.")
    solver = Identity(scale=scale)
    label = "T1T2" if scale == 1.0 else f"T1T2(scale={scale:g})"
    used = ReusedGraph() if reuse else cross
    response = Implicit(solver=solver, cross=used, label=f"{label}, reused" if reuse else label)
    return named(response, T1T2, {"scale": scale, "reuse": reuse, "cross": cross})


@typed
def SAMA(*, scale: float = 1.0, rel_step: float = 1e-2, cross: CrossDerivative | None = None) -> Implicit:
    r"""SAMA: the identity for the inverse, on the fixed point of the level's own optimizer.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c \approx -\text{scale}\,
        \frac{\partial^2 G}{\partial\lambda\,\partial\theta} D^T c, \qquad
        D = -\frac{\partial\text{Step}(\theta, g)}{\partial g}

    ``D^T c`` is one VJP of the optimizer's last step. It is exact for **every** differentiable optimizer, including
    bias correction, decay and amsgrad; for SGD, ``D`` is the learning rate. The mixed derivative is a central
    difference: two more forwards and gradients, first derivatives only. The result is a descent direction rather than
    the gradient.

    In an engine, for SGD, Adam, AdamW, RMSprop and Adagrad without coupled weight decay, ``D`` is computed from the
    optimizer state after the step. The extra memory is then two vectors, the gradient and the cotangent.

    Args:
        scale: Replaces the inverse of the fixed point's matrix.
        rel_step: Length of the perturbation of the central difference, in units of the parameters.
        cross: Another way to compute the mixed derivative, such as the exact ``ForwardMode()``, which respects
            ``detach()``; ``rel_step`` is then not used.

    Raises:
        ValueError: If ``scale`` or ``rel_step`` is not positive and finite.

    Reference: Choe et al., Making scalable meta learning practical, NeurIPS 2023, equations 4 to 6.

    Example:
        >>> theta, weight = torch.nn.Parameter(torch.tensor(2.0)), torch.tensor(2.0, requires_grad=True)
        >>> sgd = torch.optim.SGD([theta], lr=0.1)
        >>> best = nestor.best_response(lambda t, w: (t - w) ** 2, theta, weight, nestor.SAMA(), optimizer=sgd)
        >>> (slope,) = torch.autograd.grad(best, weight)
        >>> print(f"{slope:.3f}")  # the rate 0.1 times the curvature 2
        0.200
    """
    response = Implicit(
        solver=Identity(scale=scale),
        condition=FixedPoint(),
        cross=CentralDifference(rel_step=rel_step) if cross is None else cross,
        label="SAMA" if scale == 1.0 else f"SAMA(scale={scale:g})",
    )
    return named(response, SAMA, {"scale": scale, "rel_step": rel_step, "cross": cross})


@typed
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
        reuse: Use the gradient of the lower level's last step as one side of the difference: one more forward and
            gradient, not two. The error is then of first order in ``rel_step``, and the derivative is evaluated at the
            variables before the last step; see :class:`ReusedDifference`.
        rel_step: Length of the perturbation, in units of the parameters; see :class:`CentralDifference`.

    Raises:
        ValueError: If ``scale`` or ``rel_step`` is not positive and finite.

    Reference: Liu, Simonyan, Yang, DARTS, ICLR 2019, equations 7 and 8.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.FiniteDifference(scale=0.5, rel_step=0.01)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> (slope,) = torch.autograd.grad(theta, weight)
        >>> print(f"{slope:.3f}")
        1.000
    """
    solver = Identity(scale=scale)
    label = "FiniteDifference" if scale == 1.0 else f"FiniteDifference(scale={scale:g})"
    cross = ReusedDifference(rel_step=rel_step) if reuse else CentralDifference(rel_step=rel_step)
    response = Implicit(solver=solver, cross=cross, label=f"{label}, reused" if reuse else label)
    return named(response, FiniteDifference, {"scale": scale, "rel_step": rel_step, "reuse": reuse})
