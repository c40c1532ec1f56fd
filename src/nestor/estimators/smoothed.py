"""Gaussian smoothing: an estimated derivative for functions without a derivative."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from nestor.data.random_numbers import Captured, untouched
from nestor.errors.options import typed
from nestor.vectors import Params, Tree, algebra, flatten, unflatten

Inputs = TypeVar("Inputs", bound=Tree)


@typed
def smoothed(function: Callable[[Inputs], Tensor], inputs: Inputs, *, samples: int = 16, sigma: float = 0.01) -> Tensor:
    r"""Evaluate a scalar function, with the derivative of its average over a Gaussian.

    .. math:: \nabla\, \mathbb{E}_{\varepsilon}[f(x + \sigma\varepsilon)]
        \approx \frac{1}{n}\sum_{i=1}^{n} \frac{f(x + \sigma\varepsilon_i) - f(x - \sigma\varepsilon_i)}{2\sigma}
        \varepsilon_i

    For losses without a derivative, such as an accuracy, a simulator or a ranking. A loss calls it with the tensors to
    differentiate with respect to. The estimate is unbiased for the smoothed function. The backward pass evaluates the
    function ``2 n`` times, with the random numbers of the forward pass. Differentiable once.

    Args:
        function: ``function(inputs)``, a scalar.
        inputs: A Tensor or a nested list, tuple or dict of Tensors.
        samples: ``n``, the number of antithetic pairs.
        sigma: Standard deviation of the Gaussian, in the units of the inputs.

    Returns:
        ``function(inputs)``, with a graph to the inputs.

    Raises:
        ValueError: If ``samples`` or ``sigma`` is not positive.

    Reference: Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning, 2017.

    Example:
        >>> x = torch.tensor([0.3, -0.2], requires_grad=True)
        >>> steps = lambda x: (x > 0).float().sum()  # its derivative is zero almost everywhere
        >>> value = nestor.smoothed(steps, x, samples=1_000, sigma=0.5)
        >>> (slope,) = torch.autograd.grad(value, x)
        >>> value.item(), bool((slope > 0.3).all())
        (1.0, True)
    """
    if samples < 1:
        raise ValueError(f"smoothed(samples={samples}) must be at least 1.")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"smoothed(sigma={sigma}) must be positive and finite.")
    randomness = Captured.now()

    def evaluate(flat: Params) -> Tensor:
        with randomness.replay(), torch.no_grad():
            return function(unflatten(inputs, flat)).reshape(())

    flat = flatten(inputs, "inputs")
    value: Tensor = _Smoothed.apply(evaluate, samples, sigma, *flat)  # type: ignore[no-untyped-call]
    return value


def directions(like: Params, samples: int) -> list[list[Tensor]]:
    """Draw Gaussian vectors with the current state of the generators, and restore that state."""
    with untouched():
        return [[torch.randn_like(t) for t in like] for _ in range(samples)]


class _Smoothed(torch.autograd.Function):
    """The value of a function, with the derivative of its Gaussian average."""

    @staticmethod
    def forward(ctx: Any, evaluate: Callable[[Params], Tensor], samples: int, sigma: float, *inputs: Tensor) -> Tensor:
        ctx.evaluate, ctx.samples, ctx.sigma = evaluate, samples, sigma
        ctx.save_for_backward(*inputs)
        return evaluate(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        total = [torch.zeros_like(t) for t in inputs]
        for direction in directions(inputs, ctx.samples):
            ends = [ctx.evaluate(algebra.axpy(sign * ctx.sigma, direction, inputs)) for sign in (1.0, -1.0)]
            total = algebra.axpy((ends[0] - ends[1]) / (2 * ctx.sigma * ctx.samples), direction, total)
        return (None, None, None, *algebra.scale(cotangent, total))
