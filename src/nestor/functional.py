"""The functional core: best responses, roots and fixed points as differentiable functions, without a program."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.instruments import count_forward
from nestor.autodiff.objective import Objective
from nestor.data.random_numbers import Captured
from nestor.errors import UnsupportedError
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.rules import copy_slot
from nestor.optim.update import OptimizerUpdate, State, keep
from nestor.responses import T1T2, Implicit, Response, attach
from nestor.responses.implicit.conditions import Residual
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.solvers import GMRES, LinearSolver
from nestor.vectors import Params, Tree, flatten, unflatten

# Names of the levels, for counters and errors.
_LOWER, _ROOT = "lower", "root"

Theta = TypeVar("Theta", bound=Tree)
Inputs = TypeVar("Inputs", bound=Tree)
Result = TypeVar("Result")


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

    The value is ``theta`` itself, whatever method computed it. The response computes the derivative, which is exact at
    a point where the gradient of the objective vanishes. The result can be differentiated again, to any order.

    Args:
        objective: ``objective(theta, inputs)``, a scalar; a pure function of its arguments, except for random numbers.
            Every evaluation draws the same random numbers, from the state of torch's default generators at this call;
            numbers from numpy or Python's ``random`` are drawn anew, so draw them before and close over them.
        theta: The minimiser: a Tensor or a nested list, tuple or dict of Tensors. Only its value is used, not its
            graph.
        inputs: What the minimiser depends on: a Tensor or a nested list, tuple or dict of Tensors. Those that have a
            graph or require grad receive gradients.
        response: How to differentiate; None means ``T1T2()``, a cheap approximation. ``Implicit(solver=...)`` is exact.
        optimizer: For responses that use the optimizer of the level. ``Unrolled(steps=n)`` takes ``n`` steps of it from
            ``theta``, and the result is the last iterate. ``SAMA`` and ``FixedPoint`` use its update rule and state.
            Its parameters must be the tensors of ``theta``, in the same order. It is read, not changed.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta`` or ``inputs`` holds anything but tensors.
        ValueError: If ``theta`` has no tensor, or the optimizer has parameters of other shapes.
        UnsupportedError: If the optimizer has complex parameters.
        NestorError: In the backward pass, if the objective is not a differentiable scalar or a solve fails.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, Implicit())
        >>> torch.autograd.grad(theta, weight)  # the minimiser is the weight
        (tensor(1.),)
    """
    point, upper, term = _flattened(_LOWER, objective, theta, inputs)
    response = T1T2() if response is None else response
    lower = LowerLevel(Objective(_LOWER, (term,)))
    if optimizer is not None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.is_complex() for p in held):
            raise UnsupportedError(
                "best_response(optimizer=...) steps real tensors, and theta is complex. Hold real and imaginary parts "
                "as real tensors, torch.view_as_real(theta), and use torch.view_as_complex in the objective."
            )
        if [p.shape for p in held] != [p.shape for p in point]:
            raise ValueError(
                f"The optimizer holds parameters of the shapes {[tuple(p.shape) for p in held]}, but theta has the "
                f"shapes {[tuple(p.shape) for p in point]}. Make the optimizer of theta's tensors, in the same order."
            )
        rule = OptimizerUpdate.of(optimizer, held)
        spec = response.history_spec
        steps = [StepRecord((), rule)] * ((spec.window if spec is not None else None) or 1)
        start = State([p.detach() for p in point], [copy_slot(optimizer.state.get(p, {})) for p in held])
        history = LevelHistory((), steps=steps, states={0: keep(start)}, planned=True)
        lower = replace(lower, trajectory=Trajectory(history, lambda record: lower.objective))
    return unflatten(theta, attach(response, lower, point, upper))


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

    For optimality conditions other than a vanishing gradient: equilibria, proximal and projected steps, KKT systems
    whose multipliers are part of ``theta``. The result can be differentiated again, to any order.

    Args:
        residual: ``residual(theta, inputs)``, with the structure of ``theta``; a pure function, except for random
            numbers, which are the same in every evaluation.
        theta: The root, a Tensor or a nested list, tuple or dict of Tensors. Any method may have computed it.
        inputs: What the root depends on: a Tensor or a nested list, tuple or dict of Tensors.
        solver: Solves :math:`(\partial r/\partial\theta)^T z = c`; None means ``GMRES(max_steps=100, rtol=1e-8)``. The
            matrix need not be symmetric.
        damping: A number that is added to the diagonal of the matrix, in units of its eigenvalues.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta``, ``inputs`` or the residual holds anything but tensors.
        ValueError: If ``theta`` has no tensor, or the tensors of the residual have other shapes.
        NestorError: In the backward pass, if the solve fails.

    References: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019. Blondel et al., Efficient and modular
    implicit differentiation, NeurIPS 2022.
    """
    point, upper, evaluate = _flattened(_ROOT, residual, theta, inputs)

    def function(flat_theta: Params, flat_inputs: Params) -> list[Tensor]:
        values = flatten(evaluate(flat_theta, flat_inputs))
        if [v.shape for v in values] != [p.shape for p in point]:
            raise ValueError(
                f"The residual has the shapes {[tuple(v.shape) for v in values]}, but theta has the shapes "
                f"{[tuple(p.shape) for p in point]}: a root needs one equation for every variable."
            )
        return values

    chosen = GMRES(max_steps=100, rtol=1e-8) if solver is None else solver
    response = Implicit(solver=chosen, condition=Residual(function=function), damping=damping)
    return unflatten(theta, attach(response, LowerLevel(Objective(_ROOT, ())), point, upper))


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

    It is the :func:`root` of :math:`r = \theta - u(\theta, \lambda)`. With the solver ``Identity()`` this is
    Jacobian-free backpropagation (Fung et al., 2022). With ``Neumann(step_size=1.0)`` it is the gradient through the
    last steps.

    Args:
        update: ``update(theta, inputs)``, with the structure of ``theta``.
        theta: The fixed point.
        inputs: What the fixed point depends on.
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
            raise ValueError(f"The update returns {len(updated)} tensors, but theta has {len(current)} tensors.")
        return unflatten(values, [c - u for c, u in zip(current, updated, strict=True)])

    return root(residual, theta, inputs, solver, damping=damping)


def _flattened(
    name: str, function: Callable[[Theta, Inputs], Result], theta: Theta, inputs: Inputs
) -> tuple[list[Tensor], list[Tensor], Callable[[Params, Params], Result]]:
    """Flatten the arguments of a function, and make it a function of flat lists that replays its random numbers."""
    point, upper = flatten(theta), flatten(inputs)
    if not point:
        raise ValueError("theta was given without a tensor: there is nothing to differentiate.")
    randomness = Captured.now()

    def evaluate(flat_theta: Params, flat_inputs: Params) -> Result:
        with randomness.replay():
            count_forward(name)
            return function(unflatten(theta, flat_theta), unflatten(inputs, flat_inputs))

    return point, upper, evaluate
