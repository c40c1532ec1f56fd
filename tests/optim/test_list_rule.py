"""Rules on lists: the bits of torch's own steps, and the derivatives of the functional step by autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from nestor.optim import functional_step, optimizer_state
from nestor.optim.list_rule import ListRule
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, closed_form_of

DECAY = {"weight_decay": 0.1}
CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    *((SGD, {**one, **two}) for one in ({}, DECAY, {"maximize": True}) for two in ({}, {"momentum": 0.9})),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    *(
        (kind, {"weight_decay": decay, **rest})
        for kind, decay, rest in itertools.product((Adam, AdamW), (0.0, 0.1), ({}, {"maximize": True}))
    ),
    (Adam, {"betas": (0.5, 0.8), "eps": 1e-2}),
    (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    *(
        (RMSprop, {"centered": centered, "momentum": momentum, "eps": 1e-2, "alpha": 0.8, **rest})
        for centered, momentum, rest in itertools.product((False, True), (0.0, 0.5), ({}, DECAY, {"maximize": True}))
    ),
    *(
        (Adagrad, {"lr_decay": 0.2, **rest})
        for rest in ({}, DECAY, {"maximize": True, "initial_accumulator_value": 0.2})
    ),
]
IDS = [f"{kind.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for kind, options in CASES]
SHAPES: list[tuple[int, ...]] = [(3, 4), (4,), (), (2, 3, 2), (5,)]


def make(
    kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Optimizer, list[Tensor]]:
    """Three groups, whose parameters are not in the order of the level's variables; one has no weight decay."""
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]
    groups = [{"params": params[3:]}, {"params": params[:2], "lr": 0.03}, {"params": params[2:3], "weight_decay": 0.0}]
    return kind(groups, **{"lr": 0.1, **options}), params


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """Gradients, of which one entry was always zero, one variable has none at every second step, and one never has."""
    generator = torch.Generator().manual_seed(step)
    grads: list[Tensor | None] = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    for place in (0, 3):
        known = grads[place]
        assert known is not None
        known.view(-1)[1] = 0.0
    grads[1] = None if step % 2 else grads[1]
    grads[4] = None
    return grads


def rule_of(optimizer: Optimizer, params: list[Tensor]) -> tuple[OptimizerUpdate, ListRule]:
    """Read the rule."""
    update = OptimizerUpdate.of(optimizer, params)
    rule = closed_form_of(update)
    assert rule is not None
    return update, rule


def state_of(optimizer: Optimizer, params: list[Tensor]) -> State:
    """Copy variables and memory."""
    known = {
        id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in optimizer.state.items()
    }
    return State([p.detach().clone() for p in params], [known.get(id(p), {}) for p in params])


def take(optimizer: Optimizer, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Take the optimizer's own step."""
    for parameter, gradient in zip(params, grads, strict=True):
        parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_step_has_the_bits_of_the_optimizer(kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Four steps of other lengths; the arguments do not change."""
    optimizer, params = make(kind, options, dtype)
    update, rule = rule_of(optimizer, params)
    for step in range(4):
        grads, before, same = gradients(step, dtype), state_of(optimizer, params), state_of(optimizer, params)
        with torch.no_grad():
            found = State(*rule.step(before.params, grads, before.slots))
        take(optimizer, params, grads)
        expected = state_of(optimizer, params)
        for got, wanted in ((found, expected), (update.step(before, grads, {}), expected), (before, same)):
            assert all(torch.equal(p, q) for p, q in zip(got.params, wanted.params, strict=True))
            for slot, other in zip(got.slots, wanted.slots, strict=True):
                assert all(torch.equal(slot[k], v) for k, v in other.items() if isinstance(v, Tensor))


def by_autograd(
    optimizer: Optimizer, update: OptimizerUpdate, before: State, grads: list[Tensor | None], cotangents: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Pull cotangents back through the graph of the functional step."""
    leaves = before.replace([t.clone().requires_grad_() for t in before.tensors()])
    probes = [None if g is None else g.clone().requires_grad_() for g in grads]
    order = update.order
    arranged: list[Any] = [[of[i] for i in order] for of in (leaves.params, probes, leaves.slots)]
    params, slots = functional_step(optimizer, *arranged)
    back = sorted(range(len(order)), key=order.__getitem__)
    after = State([params[i] for i in back], [slots[i] for i in back])
    pairs = [(o, c) for o, c in zip(after.tensors(), cotangents, strict=False) if c is not None and o.requires_grad]
    wrt = [*leaves.tensors(), *(p for p in probes if p is not None)]
    found = torch.autograd.grad([o for o, _ in pairs], wrt, [c for _, c in pairs], allow_unused=True)
    own, through = found[: len(leaves.tensors())], iter(found[len(leaves.tensors()) :])
    return list(own), [None if p is None else next(through) for p in probes]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_vjp_is_that_of_the_functional_step(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """First and later steps; cotangents on everything, on the variables alone, on some variables, on none of them."""
    optimizer, params = make(kind, options)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # a scheduler
        update, rule = rule_of(optimizer, params)
        grads, before = gradients(step), state_of(optimizer, params)
        after = update.step(before, grads, {})
        whole = [torch.randn_like(t) for t in after.tensors()]
        count = len(params)
        for cotangents in (
            whole,
            whole[:count],
            [None, *whole[1:count]],
            [*whole[:3], None, *whole[4:-1], None],
            [*[None] * count, *whole[count:]],
        ):
            if all(c is None for c in cotangents):
                continue
            given = [None if c is None else c.clone() for c in cotangents]
            same = [None if c is None else c.clone() for c in cotangents[:count]]
            with torch.no_grad():
                on_params, on_slots, vector = rule.pull_back(
                    before.params, grads, before.slots, after.slots, after.cotangents(given)
                )
            found = [*before.list_cotangents(on_params, on_slots), *vector]
            own, through = by_autograd(optimizer, update, before, grads, cotangents)
            for got, wanted in zip(found, [*own, *through], strict=True):
                zero = torch.zeros((), dtype=torch.float64)
                got, wanted = (zero if v is None else v for v in (got, wanted))
                torch.testing.assert_close(*torch.broadcast_tensors(got, wanted), rtol=1e-12, atol=1e-14)
            assert all(a is None or torch.equal(a, b) for a, b in zip(same, given, strict=False))
        take(optimizer, params, grads)


def test_a_momentum_that_becomes_zero() -> None:
    """The memory that the rule leaves as it is keeps its cotangent."""
    optimizer, params = make(SGD, {"momentum": 0.9})
    take(optimizer, params, gradients(0))
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    update, rule = rule_of(optimizer, params)
    before, grads = state_of(optimizer, params), gradients(2)
    after = update.step(before, grads, {})
    whole = [torch.randn_like(t) for t in after.tensors()]
    on_params, on_slots, _ = rule.pull_back(before.params, grads, before.slots, after.slots, after.cotangents(whole))
    assert all(torch.equal(a, b) for a, b in zip(before.list_cotangents(on_params, on_slots), whole, strict=True))


def test_a_variance_of_zero() -> None:
    """Centered RMSprop with the same gradient long enough: the variance is zero, its root has the derivative zero."""
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = RMSprop([weight], lr=0.1, alpha=0.0, centered=True, eps=1e-2)
    grads: list[Tensor | None] = [torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)]
    for _ in range(2):
        update, rule = rule_of(optimizer, [weight])
        before = state_of(optimizer, [weight])
        after = update.step(before, grads, {})
        cotangents = [torch.randn_like(t) for t in after.tensors()]
        own, through = by_autograd(optimizer, update, before, grads, [c.clone() for c in cotangents])
        on_params, on_slots, vector = rule.pull_back(
            before.params, grads, before.slots, after.slots, after.cotangents(cotangents)
        )
        found = [*before.list_cotangents(on_params, on_slots), *vector]
        torch.testing.assert_close(found, [*own, *through], rtol=1e-12, atol=0)
        take(optimizer, [weight], grads)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Adam, {"amsgrad": True}), (NAdam, {}), (Adam, {"lr": torch.tensor(0.1)}), (Adam, {"capturable": True})],
    ids=str,
)
def test_other_rules_have_a_graph(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """And learned hyperparameters, clipping and complex variables."""
    weight = torch.zeros(2, requires_grad=True)
    assert closed_form_of(OptimizerUpdate.of(kind([weight], **options), [weight])) is None
    adam = Adam([weight])
    assert closed_form_of(OptimizerUpdate.of(adam, [weight], clip_norm=1.0)) is None
    assert closed_form_of(OptimizerUpdate.of(adam, [weight], learned={(0, ("lr",)): ("rate", 0, 0)})) is None
    other = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    assert closed_form_of(OptimizerUpdate.of(Adam([other]), [other])) is None
    assert not optimizer_state(adam)[0]
