"""The functional core: a best response for people with their own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor

from nestor import tree
from nestor.evaluations import count_forward
from nestor.lower_level import LowerLevel
from nestor.randomness import Captured
from nestor.responses import T1T2, Response, attach
from nestor.tree import Params, Tree

NAME = "lower"

Theta = TypeVar("Theta", bound=Tree)
Inputs = TypeVar("Inputs", bound=Tree)


def best_response(
    objective: Callable[[Theta, Inputs], Tensor], theta: Theta, inputs: Inputs, response: Response | None = None
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

    Returns:
        ``theta`` attached to ``inputs``, in the same structure.

    Raises:
        TypeError: If ``theta`` or ``inputs`` holds anything but tensors.
        ValueError: If ``theta`` has no tensor.
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

    attached = attach(response or T1T2(), LowerLevel(NAME, (term,)), point, upper)
    return cast(Theta, tree.unflatten(theta, attached))
