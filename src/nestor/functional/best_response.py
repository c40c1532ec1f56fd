"""The best response of an objective as a differentiable function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from nestor.autodiff.objective import Objective
from nestor.errors import LossError, UnsupportedError
from nestor.errors.options import typed
from nestor.functional.function import PureFunction
from nestor.functional.node import Attachment
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.rules import copy_slot
from nestor.optim.state import State, keep
from nestor.optim.update import OptimizerUpdate
from nestor.responses import T1T2, Response
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.vectors import Params, Tree

# Name of the level, for counters and errors.
_LOWER = "lower"

Theta = TypeVar("Theta", bound=Tree)
Inputs = TypeVar("Inputs", bound=Tree)


@typed
def best_response(
    objective: Callable[[Theta, Inputs], Tensor] | nn.Module,
    theta: Theta,
    inputs: Inputs,
    response: Response | None = None,
    *,
    optimizer: Optimizer | None = None,
) -> Theta:
    r"""Make ``theta``, a minimiser of ``objective(., inputs)``, a differentiable function of ``inputs``.

    .. math:: \theta^*(\lambda) = \arg\min_\theta G(\theta, \lambda)

    The value is ``theta`` itself, whatever method computed it. The response computes the derivative, which is exact at
    a point where the gradient of the objective vanishes. The result can be differentiated again, to any order, in
    reverse and in forward mode, with batched cotangents, and under the transforms of ``torch.func``.

    Args:
        objective: ``objective(theta, inputs)``, a scalar; a pure function of its arguments, except for random numbers.
            Every evaluation draws the same random numbers, from the state of the generators at this call. The
            parameters of a module are inputs too. All else that requires a gradient must be among the arguments.
        theta: The minimiser: a Tensor or a nested list, tuple or dict of Tensors. Only its value is used, not its
            graph.
        inputs: What the minimiser depends on: a Tensor or a nested list, tuple or dict of Tensors. Those that have a
            graph or require grad receive gradients. Integer and boolean tensors are constants.
        response: How to differentiate; None means ``T1T2()``, a cheap approximation. ``Implicit(solver=...)`` is exact.
        optimizer: For responses that use the optimizer of the level. ``Unrolled(steps=n)`` takes ``n`` steps of it from
            ``theta``, and the result is the last iterate. ``SAMA`` and ``FixedPoint`` use its update rule and state.
            Its parameters must be the tensors of ``theta``, in the same order. It is read, not changed.

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta`` or ``inputs`` holds anything but tensors, or ``theta`` one of integers.
        ValueError: If ``theta`` has no tensor, or the optimizer has parameters of other shapes.
        UnsupportedError: If the objective reads other tensors that require gradients: at once, or in the
            backward pass if they are hidden in other functions. If the response differentiates the objective twice, and
            the backward of a custom function in it has no derivative. If a hyperparameter of the optimizer requires a
            gradient, or theta is complex and an optimizer is given.
        NestorError: In the backward pass, if the objective is not a differentiable scalar or a solve fails.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, nestor.Implicit())
        >>> torch.autograd.grad(theta, weight)  # the minimiser is the weight
        (tensor(1.),)
    """
    function = PureFunction("best_response", _LOWER, objective, theta, inputs)
    chosen = T1T2() if response is None else response
    if optimizer is not None:
        _check(optimizer, function)

    def lower(point: Params, constants: Params) -> tuple[Response, LowerLevel]:
        def term(values: Params, given: Params) -> Tensor:
            return _scalar(function(values, given, constants), values)

        level = LowerLevel(Objective(_LOWER, (term,), only_once=function.only_once), alone=True)
        return chosen, level if optimizer is None else _with_steps(level, chosen, optimizer, point)

    node = Attachment(lower, function.check, function.sizes, function.may_read_others)
    attached: Theta = function.result(node.attach(*function.arguments))
    return attached


def _with_steps(level: LowerLevel, response: Response, optimizer: Optimizer, point: Params) -> LowerLevel:
    """Plan as many steps of the optimizer as the response differentiates."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    spec = response.history_spec
    steps = [StepRecord((), OptimizerUpdate.of(optimizer, held))] * ((spec.window if spec is not None else None) or 1)
    start = State([p.detach() for p in point], [copy_slot(optimizer.state.get(p, {})) for p in held])
    history = LevelHistory((), steps=steps, states={0: keep(start)}, planned=True)
    return replace(level, trajectory=Trajectory(history, lambda record: level.objective))


def _check(optimizer: Optimizer, function: PureFunction) -> None:
    """Refuse an optimizer of other tensors, and one whose hyperparameters would get no gradient."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.is_complex() for p in held):
        raise UnsupportedError(
            "best_response(optimizer=...) steps real tensors, and theta is complex. Give torch.view_as_real(theta), "
            "and use torch.view_as_complex in the objective."
        )
    if [p.shape for p in held] != [p.shape for p in function.variables]:
        raise ValueError(
            f"The optimizer holds parameters of the shapes {[tuple(p.shape) for p in held]}, but theta has the "
            f"shapes {[tuple(p.shape) for p in function.variables]}. Make the optimizer of theta's tensors, in the "
            "same order."
        )
    options = [(name, value) for group in optimizer.param_groups for name, value in group.items() if name != "params"]
    for name, value in options:
        values = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(v, Tensor) and v.requires_grad for v in values):
            raise UnsupportedError(
                f"best_response: the optimizer's {name!r} requires a gradient, and would get none. Write the update as "
                "a function of it, nestor.fixed_point(update, theta, inputs), learn it in a level of a program, "
                "nestor.Problem(optimizer=...), or use .detach()."
            )


def _scalar(value: Any, variables: Params) -> Tensor:
    """Check the result of an objective."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"The objective returned {what}; it must return a real scalar tensor. Reduce it: .mean().")
    if any(v.requires_grad for v in variables) and not value.requires_grad:
        raise LossError(
            "The value of the objective has no graph to theta and the inputs. Evaluate it without torch.no_grad(), "
            ".detach(), .item() and torch.tensor(...)."
        )
    return value.reshape(())
