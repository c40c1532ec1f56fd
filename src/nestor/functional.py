"""The functional core: best responses, roots and fixed points for people with their own loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.instruments import count_forward
from nestor.autodiff.scope import Objective
from nestor.data.draws import Captured
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.rules import copy_slot
from nestor.optim.update import OptimizerUpdate, State, keep
from nestor.responses import T1T2, Implicit, Response, attach
from nestor.responses.implicit.conditions import Residual
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.solvers import GMRES, LinearSolver
from nestor.vectors.algebra import Params
from nestor.vectors.structure import Tree, flatten, unflatten

# Names of the levels, for counters and errors.
_LOWER, _ROOT = "lower", "root"

Theta = TypeVar("Theta", bound=Tree)
Inputs = TypeVar("Inputs", bound=Tree)


def best_response(
    objective: Callable[[Theta, Inputs], Tensor],
    theta: Theta,
    inputs: Inputs,
    response: Response | None = None,
    *,
    optimizer: Optimizer | None = None,
) -> Theta:
    r"""Make ``theta``, a minimiser of ``objective(., inputs)``, a differentiable function of ``inputs``.

    .. math:: \theta^*(\lambda) = \arg\min_\theta G(\theta, \lambda)

    The value is ``theta`` itself, however it was found; the derivative is the response's, exact where the gradient of
    the objective vanishes. The result can be differentiated again, to any order.

    Args:
        objective: ``objective(theta, inputs)``, a scalar; a pure function of its arguments but for random numbers,
            which are the same in every evaluation: those that follow the generators' state at this call.
        theta: The minimiser: a Tensor or a nested list, tuple or dict of Tensors. Taken as a value, without its graph.
        inputs: What it responds to, structured likewise; those that carry a graph or require grad receive gradients.
        response: How to differentiate; ``None`` is ``T1T2()``, the cheap approximation. ``Implicit(solver=...)`` is
            exact.
        optimizer: For responses that look at the level's optimizer: ``Unrolled(steps=n)`` takes ``n`` of its steps from
            ``theta`` on, and the result is where they lead; ``SAMA`` and ``FixedPoint`` take its rule and state. Its
            parameters are the tensors of ``theta``, in the same order; it is only read.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta`` or ``inputs`` holds anything but tensors.
        ValueError: If ``theta`` has no tensor, or the optimizer other parameters.
        NestorError: In the backward pass, if the objective is not a differentiable scalar or a solve fails.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, Implicit())
        >>> torch.autograd.grad(theta, weight)  # the minimiser moves as the weight does
        (tensor(1.),)
    """
    point, upper = flatten(theta), flatten(inputs)
    if not point:
        raise ValueError("best_response was given a theta without a tensor: there is nothing to differentiate.")
    randomness = Captured.now()

    def term(flat_theta: Params, flat_inputs: Params) -> Tensor:
        with randomness.replay():
            count_forward(_LOWER)
            return objective(cast(Theta, unflatten(theta, flat_theta)), cast(Inputs, unflatten(inputs, flat_inputs)))

    response = T1T2() if response is None else response
    lower = LowerLevel(Objective(_LOWER, (term,)))
    if optimizer is not None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if [p.shape for p in held] != [p.shape for p in point]:
            raise ValueError(
                f"The optimizer holds parameters of the shapes {[tuple(p.shape) for p in held]}, theta has "
                f"{[tuple(p.shape) for p in point]}: make it of theta's tensors, in the same order."
            )
        rule = OptimizerUpdate.of(optimizer, held)
        spec = response.history_spec
        steps = [StepRecord((), rule)] * ((spec.window if spec is not None else None) or 1)
        start = State([p.detach() for p in point], [copy_slot(optimizer.state.get(p, {})) for p in held])
        history = LevelHistory((), steps=steps, states={0: keep(start)}, planned=True)
        lower = replace(lower, trajectory=Trajectory(history, lambda record: lower.objective))
    attached = attach(response, lower, point, upper)
    return cast(Theta, unflatten(theta, attached))


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
    point, upper = flatten(theta), flatten(inputs)
    if not point:
        raise ValueError("root was given a theta without a tensor: there is nothing to differentiate.")
    randomness = Captured.now()

    def function(flat_theta: Params, flat_inputs: Params) -> list[Tensor]:
        with randomness.replay():
            count_forward(_ROOT)
            value = residual(cast(Theta, unflatten(theta, flat_theta)), cast(Inputs, unflatten(inputs, flat_inputs)))
        values = flatten(value)
        if [v.shape for v in values] != [p.shape for p in point]:
            raise ValueError(
                f"The residual has the shapes {[tuple(v.shape) for v in values]} and theta "
                f"{[tuple(p.shape) for p in point]}: a root needs one equation for every variable."
            )
        return values

    chosen = GMRES(max_steps=100, rtol=1e-8) if solver is None else solver
    response = Implicit(solver=chosen, condition=Residual(function=function), damping=damping)
    return cast(Theta, unflatten(theta, attach(response, LowerLevel(Objective(_ROOT, ())), point, upper)))


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
        updated = flatten(update(values, given))
        current = flatten(values)
        if len(updated) != len(current):
            raise ValueError(f"The update returns {len(updated)} tensors for a theta of {len(current)}.")
        return cast(Theta, unflatten(values, [c - u for c, u in zip(current, updated, strict=True)]))

    return root(residual, theta, inputs, solver, damping=damping)
