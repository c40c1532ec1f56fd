"""Roots and fixed points as differentiable functions."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from nestor.autodiff.objective import Objective
from nestor.errors.options import typed
from nestor.functional.function import PureFunction, real
from nestor.functional.node import Attachment
from nestor.responses import Implicit, Response
from nestor.responses.implicit.conditions import Residual
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.solvers import GMRES, LinearSolver
from nestor.vectors import Params, Tree, flatten

# Name of the level, for counters and errors.
_ROOT = "root"

Theta = TypeVar("Theta", bound=Tree)
Inputs = TypeVar("Inputs", bound=Tree)


@typed
def root(
    residual: Callable[[Theta, Inputs], Theta] | nn.Module,
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

    For optimality conditions other than a vanishing gradient: equilibria, proximal and projected steps, KKT systems
    whose multipliers are part of ``theta``. The result can be differentiated again, to any order, in reverse and in
    forward mode, with batched cotangents, and under the transforms of ``torch.func``.

    Args:
        residual: ``residual(theta, inputs)``, with the structure of ``theta``; a pure function, except for random
            numbers, which are the same in every evaluation. The parameters of a module are inputs too. All else that
            requires a gradient must be among the arguments.
        theta: The root, a Tensor or a nested list, tuple or dict of Tensors. Any method may have computed it.
        inputs: What the root depends on: a Tensor or a nested list, tuple or dict of Tensors. Integer and boolean
            tensors are constants.
        solver: Solves :math:`(\partial r/\partial\theta)^T z = c`; None means ``GMRES(max_steps=100, rtol=1e-8)``. The
            matrix need not be symmetric.
        damping: A number that is added to the diagonal of the matrix, in units of its eigenvalues.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta``, ``inputs`` or the residual holds anything but tensors, or ``theta`` one of integers.
        ValueError: If ``theta`` has no tensor, or the tensors of the residual have other shapes.
        UnsupportedError: If the residual reads other tensors that require gradients: at once, or in the
            backward pass if they are hidden in other functions.
        NestorError: In the backward pass, if the solve fails.

    References: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019. Blondel et al., Efficient and modular
    implicit differentiation, NeurIPS 2022.

    Example:
        >>> target = torch.tensor(8.0, requires_grad=True)
        >>> cube_root = nestor.root(lambda t, target: t**3 - target, torch.tensor(2.0), target)
        >>> torch.autograd.grad(cube_root, target)  # 1 / (3 t^2)
        (tensor(0.0833),)
    """
    function = PureFunction("root", _ROOT, residual, theta, inputs)
    found: Theta = _attached(function, function, solver, damping)
    return found


@typed
def fixed_point(
    update: Callable[[Theta, Inputs], Theta] | nn.Module,
    theta: Theta,
    inputs: Inputs,
    solver: LinearSolver | None = None,
    *,
    damping: float = 0.0,
) -> Theta:
    r"""Make ``theta``, a fixed point of ``update(., inputs)``, a differentiable function of ``inputs``.

    .. math:: \theta^*(\lambda) = u(\theta^*(\lambda), \lambda)

    It is the :func:`root` of :math:`r = \theta - u(\theta, \lambda)`. With the solver ``Identity()`` this is
    Jacobian-free backpropagation (Fung et al., 2022). With ``Neumann(step_size=1.0)`` it is the gradient through the
    last steps.

    Args:
        update: ``update(theta, inputs)``, with the structure of ``theta``. The parameters of a module are inputs too:
            a layer of a deep equilibrium model is ``nestor.fixed_point(cell, z, x)``.
        theta: The fixed point.
        inputs: What the fixed point depends on.
        solver: As for :func:`root`.
        damping: As for :func:`root`.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: As for :func:`root`.
        ValueError: As for :func:`root`.
        UnsupportedError: As for :func:`root`.

    Example:
        >>> x, z = torch.tensor([0.5, -0.2], requires_grad=True), torch.zeros(2)
        >>> cell = lambda z, x: torch.tanh(0.5 * z + x)
        >>> for _ in range(100):
        ...     z = cell(z, x.detach())
        >>> z = nestor.fixed_point(cell, z, x)
        >>> torch.autograd.grad(z.sum(), x)
        (tensor([...]),)
    """
    function = PureFunction("fixed_point", _ROOT, update, theta, inputs)

    def residual(values: Params, given: Params, constants: Params) -> list[Tensor]:
        updated = real(flatten(function(values, given, constants), "update"))
        if len(updated) != len(values):
            raise ValueError(f"The update returns {len(updated)} tensors, but theta has {len(values)} tensors.")
        return [v - u for v, u in zip(values, updated, strict=True)]

    found: Theta = _attached(function, residual, solver, damping)
    return found


def _attached(
    function: PureFunction,
    residual: Callable[[Params, Params, Params], Any],
    solver: LinearSolver | None,
    damping: float,
) -> Any:
    chosen = GMRES(max_steps=100, rtol=1e-8) if solver is None else solver

    def lower(theta: Params, constants: Params) -> tuple[Response, LowerLevel]:
        def equations(values: Params, inputs: Params) -> list[Tensor]:
            found = real(flatten(residual(values, inputs, constants), "residual"))
            if [v.shape for v in found] != [p.shape for p in theta]:
                raise ValueError(
                    f"The residual has the shapes {[tuple(v.shape) for v in found]}, but theta has the shapes "
                    f"{[tuple(p.shape) for p in theta]}: a root needs one equation for every variable."
                )
            return found

        response = Implicit(solver=chosen, condition=Residual(function=equations), damping=damping)
        return response, LowerLevel(Objective(_ROOT, ()), alone=True)

    lower([], [])  # refuses options that are out of range
    attached = Attachment(lower, function.check, function.sizes, function.may_read_others).attach(*function.arguments)
    return function.result(attached)
