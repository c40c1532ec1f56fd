"""Tasks at once and in turn, beside torch's own vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestor.autodiff.vmap import looped, vectorized

COUNT = 3


def one(batch: Any, mine: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x, rest = batch
    out = torch.relu(x @ mine["w"].T + mine["b"]) + rest["shift"]
    return F.mse_loss(out, torch.ones_like(out)), {"size": mine["w"].square().sum(), "one": torch.ones(())}


def arguments() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    stacked = {"w": torch.randn(COUNT, 2, 4), "b": torch.randn(COUNT, 2)}
    batch = (torch.randn(COUNT, 5, 4), {"shift": torch.randn(COUNT, 1)})
    return batch, {name: tensor.double().requires_grad_() for name, tensor in stacked.items()}


@pytest.mark.parametrize("way", [vectorized, looped])
def test_second_derivatives_of_every_task(way: Callable[..., Any]) -> None:
    """Losses, metrics, gradients and gradients of gradients are those of torch.func.vmap."""

    def derivatives(function: Callable[..., Any]) -> list[Tensor]:
        (x, rest), stacked = arguments()
        losses, metrics = function((x.double(), {"shift": rest["shift"].double()}), stacked)
        first = torch.autograd.grad(losses.sum(), list(stacked.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), list(stacked.values()))
        return [losses, metrics["size"], metrics["one"], *first, *second]

    found = derivatives(lambda batch, stacked: way(one, batch, stacked, COUNT))
    expected = derivatives(lambda batch, stacked: torch.func.vmap(one, randomness="different")(batch, stacked))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", [vectorized, looped])
def test_parameters_require_gradients_inside(way: Callable[..., Any]) -> None:
    """Losses choose by that what they decay; batches and buffers do not."""
    seen: dict[str, bool] = {}

    def look(x: Tensor, mine: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        seen.update({name: tensor.requires_grad for name, tensor in mine.items()}, x=x.requires_grad)
        return sum((p.square().sum() for p in mine.values() if p.requires_grad), x.sum()), {}

    weight = torch.full((COUNT, 2), 3.0, requires_grad=True)
    losses, _ = way(look, torch.ones(COUNT, 1), {"weight": weight, "buffer": torch.ones(COUNT, 2)}, COUNT)
    assert seen == {"weight": True, "buffer": False, "x": False}
    assert losses.tolist() == [19.0] * COUNT
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert torch.equal(gradient, 2 * weight)


@pytest.mark.parametrize("way", [vectorized, looped])
def test_every_task_has_random_numbers_of_its_own(way: Callable[..., Any]) -> None:
    """One mask for all would give one number."""
    losses, _ = way(lambda x, mine: (F.dropout(x).sum(), {}), torch.ones(COUNT, 64), {}, COUNT)
    assert losses.unique().numel() == COUNT


@pytest.mark.parametrize("way", [vectorized, looped])
@pytest.mark.parametrize("batch", [torch.ones(COUNT + 1, 2), torch.ones(()), (torch.ones(COUNT), "a word")])
def test_what_is_no_batch_of_tasks(way: Callable[..., Any], batch: Any) -> None:
    """It is refused before anything is evaluated."""
    with pytest.raises(ValueError, match="the batch holds"):
        way(lambda x, mine: pytest.fail("evaluated"), batch, {}, COUNT)


def test_an_error_inside_leaves_nothing_behind() -> None:
    """After it tensors are what they were: no level of mapping is open."""
    with pytest.raises(ZeroDivisionError):
        vectorized(lambda x, mine: 1 / 0, torch.ones(COUNT, 2), {}, COUNT)
    assert torch._C._functorch.maybe_current_level() is None
