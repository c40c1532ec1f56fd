"""The central difference takes both of its sides in the memory of one point."""

from typing import Any

import pytest
import torch
from torch import Tensor

import nestor


class Product(torch.autograd.Function):
    """The dot product of a fused loss, whose gradients are its arguments themselves, not copies."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return b, a


def hypergradient(response: nestor.Response) -> Tensor:
    theta, factor = nestor.Variable(torch.tensor([0.3, -0.2]).double()), nestor.Variable(torch.ones(2).double())
    target = torch.tensor([1.0, 2.0]).double()
    program = nestor.Program(
        theta=nestor.Problem(
            theta,
            lambda theta, factor: Product.apply(factor(), theta()) + 0.5 * theta().square().sum(),
            optimizer=torch.optim.SGD(theta.parameters(), lr=0.5),
            response=response,
        ),
        factor=nestor.Problem(
            factor,
            lambda theta: 0.5 * (theta() - target).square().sum(),
            optimizer=torch.optim.SGD(factor.parameters(), lr=1.0),
        ),
    )
    nestor.Engine(program).run(1)
    return 1.0 - factor.value.detach()


@pytest.mark.parametrize("rel_step", [1e-1, 1e-4])
def test_a_gradient_that_is_the_point_itself(rel_step: float) -> None:
    """The gradient at the first side is the point's own memory, in which the second side is then formed.

    The loss is bilinear, so the difference is the mixed derivative up to rounding.
    """
    exact = hypergradient(nestor.T1T2())
    assert exact.norm() > 0.1
    assert (hypergradient(nestor.FiniteDifference(rel_step=rel_step)) - exact).norm() < 1e-9
