"""The functional core: a best response for people with their own loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from torch import Tensor
from torch.optim import Optimizer

from nestor import tree
from nestor.evaluations import count_forward
from nestor.lower_level import LowerLevel
from nestor.optim.state import State, keep
from nestor.optim.update import OptimizerUpdate
from nestor.randomness import Captured
from nestor.responses import T1T2, Response, attach
from nestor.trajectory import Step, Trajectory
from nestor.tree import Params, Tree

NAME = "lower"

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
    point, upper = tree.flatten(theta), tree.flatten(inputs)
    if not point:
        raise ValueError("best_response was given a theta without a tensor: there is nothing to differentiate.")
    randomness = Captured.now()

    def term(flat_theta: Params, flat_inputs: Params) -> Tensor:
        with randomness.replay():
            count_forward(NAME)
            return objective(
                cast(Theta, tree.unflatten(theta, flat_theta)), cast(Inputs, tree.unflatten(inputs, flat_inputs))
            )

    response = T1T2() if response is None else response
    lower = LowerLevel(NAME, (term,))
    if optimizer is not None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if [p.shape for p in held] != [p.shape for p in point]:
            raise ValueError(
                f"The optimizer holds parameters of the shapes {[tuple(p.shape) for p in held]}, theta has "
                f"{[tuple(p.shape) for p in point]}: make it of theta's tensors, in the same order."
            )
        rule = OptimizerUpdate.of(optimizer, held)
        window = response.recording.window if response.recording is not None else None
        start = State([p.detach() for p in point], rule.state(held).slots)
        trajectory = Trajectory([Step(lower, rule)] * (window or 1), {0: keep(start)}, ahead=True)
        lower = replace(lower, trajectory=trajectory)
    attached = attach(response, lower, point, upper)
    return cast(Theta, tree.unflatten(theta, attached))
