"""Rules that use norms of whole tensors step each task as they would step it alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import nestor

TASKS, STEPS, RATE, LIMIT = 3, 3, 0.3, 0.2


class Normalized(Optimizer):
    """Momentum of normalized gradients: the norm is that of the whole tensor (LARS, Lamb and Muon use such norms)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": RATE})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["m"] = 0.5 * state.get("m", torch.zeros_like(p)) + p.grad / (1 + p.grad.norm())
                p.sub_(group["lr"] * state["m"])


def normalized(params: Any, grads: Any, state: Any) -> Any:
    """The same rule as a function."""
    before = [{"m": torch.zeros_like(p)} for p in params] if state is None else state
    after = [{"m": 0.5 * s["m"] + g / (1 + g.norm())} for s, g in zip(before, grads, strict=True)]
    return [p - RATE * s["m"] for p, s in zip(params, after, strict=True)], after


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, 6, 3, dtype=torch.float64, generator=generator)
    return x, 10 ** torch.arange(TASKS).double()[:, None, None] * x.sum(2, keepdim=True)  # gradients of three sizes


SUPPORT, QUERY = batch_of(1), batch_of(2)


def fit(batch: Any, fast: Any) -> Tensor:
    return F.mse_loss(fast(batch[0]), batch[1])


def query(batch: Any, fast: Any) -> Tensor:
    return F.l1_loss(fast(batch[0]), batch[1])


def by_hand(net: nn.Module, clip: float | None) -> list[Tensor]:
    """The mean hypergradient of the tasks, each adapted alone with one graph."""
    start = [p.detach().clone().requires_grad_() for p in net.parameters()]
    total = torch.zeros((), dtype=torch.float64)
    for task in range(TASKS):
        params, state = start, None
        for _ in range(STEPS):
            loss = F.mse_loss(F.linear(SUPPORT[0][task], *params), SUPPORT[1][task])
            grads = torch.autograd.grad(loss, params, create_graph=True)
            if clip is not None:
                norm = torch.cat([g.flatten() for g in grads]).norm()
                grads = [g * torch.clamp(clip / (norm + 1e-6), max=1.0) for g in grads]
            params, state = normalized(params, grads, state)
        total = total + F.l1_loss(F.linear(QUERY[0][task], *params), QUERY[1][task]) / TASKS
    return list(torch.autograd.grad(total, start))


RULES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "optimizer": lambda params: {"optimizer": Normalized(params)},
    "update": lambda params: {"update": normalized},
}


@pytest.mark.parametrize("clip", [None, LIMIT])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_each_task_has_its_own_norms(rule: str, checkpoint: Any, vectorize: bool, clip: float | None) -> None:
    torch.manual_seed(0)
    meta = nn.Linear(3, 1).double()
    fast = copy.deepcopy(meta)
    expected = by_hand(meta, clip)
    program = nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            data=[SUPPORT],
            unroll_steps=STEPS,
            init="meta",
            tasks=TASKS,
            vectorize=vectorize,
            clip_norm=clip,
            response=nestor.Unrolled(checkpoint=checkpoint),
            **RULES[rule](fast.parameters()),
        ),
        meta=nestor.Problem(meta, query, data=[QUERY], optimizer=torch.optim.SGD(meta.parameters(), lr=1.0)),
    )
    before = [p.detach().clone() for p in meta.parameters()]
    planned = program.hypergradient("meta", {"fast": SUPPORT, "meta": QUERY})
    nestor.Engine(program, seed=0).run(STEPS)
    for start, end, name, value in zip(before, meta.parameters(), planned, expected, strict=True):
        torch.testing.assert_close(planned[name], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(start - end.detach(), value, rtol=1e-9, atol=1e-12)
