"""The scope of an evaluation: tensors stay in the modules for every derivative, and come out again afterwards."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from nestor.autodiff.scope import Scope, enclosed, original, place


def slot(module: nn.Linear) -> tuple[dict[str, Tensor], str]:
    return module._parameters, "weight"


def test_tensors_leave_the_module_with_the_scope() -> None:
    module, other = nn.Linear(2, 2), torch.ones(2, 2)
    own = module.weight
    with Scope() as scope:
        place([(slot(module), other)])
        assert module.weight is other
        assert original(module._parameters, "weight") is own
    assert module.weight is own
    with scope:
        assert module.weight is other
    assert module.weight is own


def test_scopes_nest() -> None:
    module = nn.Linear(2, 2)
    own, first, second = module.weight, torch.ones(2, 2), torch.zeros(2, 2)
    with Scope() as outer:
        place([(slot(module), first)])
        with Scope():
            place([(slot(module), second)])
            assert module.weight is second
            with outer:
                assert module.weight is first
            assert module.weight is second
            assert original(module._parameters, "weight") is own
        assert module.weight is first
        with outer, outer:
            assert module.weight is first
        assert module.weight is first
    assert module.weight is own


def test_an_error_restores_the_modules() -> None:
    module = nn.Linear(2, 2)
    own = module.weight

    def fail() -> None:
        with Scope(twice=True), Scope():
            place([(slot(module), torch.ones(2, 2))])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert module.weight is own
    assert torch.backends.cuda.flash_sdp_enabled()


def test_attention_kernels_follow_the_innermost_scope() -> None:
    def fused() -> bool:
        return bool(torch.backends.cuda.flash_sdp_enabled())

    with Scope(twice=True) as outer:
        assert not fused()
        with Scope():
            assert fused()
            with outer:
                assert not fused()
            assert fused()
        assert not fused()
    assert fused()
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH), Scope(), Scope(twice=True), Scope():
        assert not fused()  # what the user chose outside


class Block(nn.Module):
    """Reads its parameters again when it is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: torch.tanh(self.inner(h)) ** 2, x, use_reentrant=False).sum()


def value(module: Block, x: Tensor, weight: Tensor) -> Tensor:
    place([(slot(module.inner), weight)])
    return module(x)


def derivatives(function: Callable[[Tensor], Tensor], point: Tensor, count: int) -> list[Tensor]:
    """Derivatives of orders 1, 2, ... along one direction."""
    direction = torch.linspace(-1.0, 1.0, point.numel(), dtype=point.dtype).view_as(point)
    current, found = function(point), []
    for order in range(count):
        (gradient,) = torch.autograd.grad(current, point, create_graph=order + 1 < count)
        found.append(gradient.detach())
        current = (gradient * direction).sum()
    return found


def test_an_enclosed_graph_is_right_to_the_fourth_order() -> None:
    """Two points in one graph, whose second is a function of the first: no point reads the other's weight."""
    torch.manual_seed(0)
    module, x = Block(), torch.randn(4, 3, dtype=torch.float64)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def evaluate(point: Tensor) -> Tensor:
        (found,) = enclosed(lambda tensors: [value(module, x, tensors[0])], [point])
        assert found is not None
        return found

    def plain(point: Tensor) -> Tensor:
        return (torch.tanh(x @ point.T + module.inner.bias) ** 2).sum()

    got = derivatives(lambda w: evaluate(w) * evaluate(0.5 * w + 0.1 * evaluate(w)), weight, 4)
    expected = derivatives(lambda w: plain(w) * plain(0.5 * w + 0.1 * plain(w)), weight, 4)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_enclosed_without_gradients() -> None:
    module, x = Block(), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        found = enclosed(lambda tensors: [value(module, x, tensors[0]), None], [module.inner.weight])
    assert found[0] is not None
    assert not found[0].requires_grad
    assert found[1] is None
