"""The mode that makes dual numbers pass for tensors that require gradients, and what it leaves behind."""

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nestor
from nestor.autodiff.forward_mode import DualMode, dual, tangent

X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)
Y = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]


class Net(nn.Module):
    """A block within a block, each of which may be checkpointed."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outer, self.inner, self.head = (nn.Linear(*sizes).double() for sizes in ((5, 7), (7, 7), (7, 1)))
        self.checkpointed = checkpointed

    def block(self, function: Any, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=False) if self.checkpointed else function(x)

    def forward(self, x: Tensor) -> Tensor:
        """Predict a number."""

        def whole(h: Tensor) -> Tensor:
            with torch.no_grad():
                scale = self.outer(h).abs().mean()
            return scale * self.block(lambda g: torch.tanh(self.inner(g)), torch.tanh(self.outer(h)))

        return self.head(self.block(whole, x))


def hypergradient(*, checkpointed: bool, cross: nestor.CrossDerivative) -> Tensor:
    net, shift = Net(checkpointed=checkpointed), nestor.Variable(torch.zeros(6, 5, dtype=torch.float64))
    program = nestor.Program(
        net=nestor.Problem(
            net, lambda net, shift: (net(X + shift()) - Y).square().mean(), response=nestor.T1T2(cross=cross)
        ),
        shift=nestor.Problem(shift, lambda net: (net(X) + Y).square().mean()),
    )
    (value,) = program.hypergradient("shift").values()
    return value


def test_a_checkpointed_product_leaves_tangents_enabled() -> None:
    """The product of a plain module is the same before and after one of a module with nested checkpoints."""
    exact = hypergradient(checkpointed=False, cross=nestor.ReverseMode())
    before = hypergradient(checkpointed=False, cross=nestor.ForwardMode())
    torch.testing.assert_close(before, exact, rtol=1e-10, atol=1e-14)
    with suppress(RuntimeError):  # a checkpointed block reads its parameters again, outside of the evaluation
        hypergradient(checkpointed=True, cross=nestor.ForwardMode())
    assert torch._C._is_fwd_grad_enabled()
    assert torch.equal(hypergradient(checkpointed=False, cross=nestor.ForwardMode()), before)


class Doubled(torch.autograd.Function):
    """Has a derivative whose code switches gradients off, or on, for a while."""

    context: Any = torch.no_grad

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def jvp(ctx: Any, direction: Tensor) -> Tensor:
        with Doubled.context():
            direction.abs()
        return 2 * direction


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_function_may_change_the_grad_mode(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch runs ``jvp`` without gradients but with tangents: afterwards these are still enabled."""
    monkeypatch.setattr(Doubled, "context", context)
    x, direction = torch.ones(2), torch.tensor([1.0, 3.0])
    with forward_ad.dual_level(), DualMode():
        number = dual(x, direction)
        square = Doubled.apply(number).square()
        with torch.no_grad():
            constant = number * 2
        assert tangent(square).tolist() == [8.0, 24.0]
        assert tangent(constant).tolist() == [0.0, 0.0]
        assert tangent(number.square()).tolist() == [2.0, 6.0]


def test_an_open_context_is_left() -> None:
    """A loss that switches gradients off for good does so for itself alone."""
    with forward_ad.dual_level():
        with torch.enable_grad(), DualMode():
            torch.set_grad_enabled(False)
        number = dual(torch.ones(1), torch.ones(1))
        assert tangent(number.square()).tolist() == [2.0]
