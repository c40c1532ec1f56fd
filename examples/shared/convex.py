"""Minima of smooth convex losses."""

from collections.abc import Callable

from torch import Tensor
from torch.optim import LBFGS


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """Return the minimum that L-BFGS with a line search finds."""
    theta = start.detach().clone().requires_grad_()
    optimizer = LBFGS([theta], max_iter=iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()
