"""The update that an accelerator decides on the device, on CPU tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nestor.training.guard import step_where

OPTIMIZERS: list[Any] = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, 0.1, centered=True, momentum=0.5),
]


def snapshot(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    state = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (parameter, *state)]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("bad", [0, 2])
def test_a_bad_step_is_as_if_it_had_not_been(make: Any, bad: int) -> None:
    """A NaN gradient at the first or at a later step: afterwards all goes on as without it, bitwise."""
    guarded, plain = (torch.nn.Parameter(torch.arange(1.0, 4.0)) for _ in range(2))
    optimizer, reference = make([guarded]), make([plain])
    for step in range(4):
        gradient = torch.tensor([0.3, -0.2, 0.1]) * (step + 1)
        if step == bad:
            guarded.grad = gradient * torch.nan
            before = snapshot(optimizer, guarded)
            step_where(torch.tensor(False), optimizer, [guarded])
            after = snapshot(optimizer, guarded)
            assert torch.equal(before[0], after[0])
            assert all(torch.isfinite(t).all() for t in after)
        guarded.grad, plain.grad = gradient.clone(), gradient.clone()
        step_where(torch.tensor(True), optimizer, [guarded])
        reference.step()
        for ours, theirs in zip(snapshot(optimizer, guarded), snapshot(reference, plain), strict=True):
            assert torch.equal(ours, theirs)
