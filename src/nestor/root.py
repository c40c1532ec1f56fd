"""Roots and fixed points: implicit differentiation of conditions that are not stationarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor

from nestor import tree
from nestor.conditions import Residual
from nestor.evaluations import count_forward
from nestor.lower_level import LowerLevel
from nestor.randomness import Captured
from nestor.responses import Implicit, attach
from nestor.solvers import GMRES, LinearSolver
from nestor.tree import Params, Tree

NAME = "root"

Theta = TypeVar("Theta", bound=Tree)
Inputs = TypeVar("Inputs", bound=Tree)


def root(
    residual: Callable[[Theta, Inputs], Theta],
    theta: Theta,
    inputs: Inputs,
    solver: LinearSolver | None = None,
    *,
    damping: float = 0.0,
) -> Theta:
    r"""Make ``theta``, a root of ``residual(., inputs)``, a differentiable function of ``inputs``.

    .. math:: r(\theta^*(\lambda), \lambda) = 0 \quad\Rightarrow\quad
        \frac{d\theta^*}{d\lambda}
        = -\Big(\frac{\partial r}{\partial\theta}\Big)^{-1} \frac{\partial r}{\partial\lambda}

    For optimality conditions that are no gradient: equilibria, proximal and projected steps, KKT systems with the
    multipliers among ``theta``. The result can be differentiated again, to any order.

    Args:
        residual: ``residual(theta, inputs)``, structured like ``theta``; a pure function but for random numbers, which
            are the same in every evaluation.
        theta: The root, however it was found; a Tensor or a nested list, tuple or dict of Tensors.
        inputs: What it depends on, structured likewise.
        solver: Solves :math:`(\partial r/\partial\theta)^T z = c`; None is ``GMRES(max_steps=100, rtol=1e-8)``. The
            matrix need not be symmetric.
        damping: Added to the matrix's diagonal.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta``, ``inputs`` or the residual holds anything but tensors.
        ValueError: If ``theta`` has no tensor, or the residual another number of tensors.
        NestorError: In the backward pass, if the solve fails.

    References: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019. Blondel et al., Efficient and modular
    implicit differentiation, NeurIPS 2022.
    """
    point, upper = tree.flatten(theta), tree.flatten(inputs)
    if not point:
        raise ValueError("root was given a theta without a tensor: there is nothing to differentiate.")
    randomness = Captured.now()

    def function(flat_theta: Params, flat_inputs: Params) -> list[Tensor]:
        with randomness.replay():
            count_forward(NAME)
            value = residual(
                cast(Theta, tree.unflatten(theta, flat_theta)), cast(Inputs, tree.unflatten(inputs, flat_inputs))
            )
        values = tree.flatten(value)
        if [v.shape for v in values] != [p.shape for p in point]:
            raise ValueError(
                f"The residual has the shapes {[tuple(v.shape) for v in values]} and theta "
                f"{[tuple(p.shape) for p in point]}: a root needs one equation for every variable."
            )
        return values

    chosen = GMRES(max_steps=100, rtol=1e-8) if solver is None else solver
    response = Implicit(solver=chosen, condition=Residual(function=function), damping=damping)
    return cast(Theta, tree.unflatten(theta, attach(response, LowerLevel(NAME, ()), point, upper)))


def fixed_point(
    update: Callable[[Theta, Inputs], Theta],
    theta: Theta,
    inputs: Inputs,
    solver: LinearSolver | None = None,
    *,
    damping: float = 0.0,
) -> Theta:
    r"""Make ``theta``, a fixed point of ``update(., inputs)``, a differentiable function of ``inputs``.

    .. math:: \theta^*(\lambda) = u(\theta^*(\lambda), \lambda)

    The :func:`root` of :math:`r = \theta - u(\theta, \lambda)`. ``Identity()`` as the solver is Jacobian-free
    backpropagation (Fung et al., 2022), ``Neumann(step_size=1.0)`` the gradient through the last steps.

    Args:
        update: ``update(theta, inputs)``, structured like ``theta``.
        theta: The fixed point.
        inputs: What it depends on.
        solver: As for :func:`root`.
        damping: As for :func:`root`.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: As for :func:`root`.
        ValueError: As for :func:`root`.
    """

    def residual(values: Theta, given: Inputs) -> Theta:
        updated = tree.flatten(update(values, given))
        current = tree.flatten(values)
        if len(updated) != len(current):
            raise ValueError(f"The update returns {len(updated)} tensors for a theta of {len(current)}.")
        return cast(Theta, tree.unflatten(values, [c - u for c, u in zip(current, updated, strict=True)]))

    return root(residual, theta, inputs, solver, damping=damping)
