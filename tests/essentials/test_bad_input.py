"""Bad input gets an error that names the level, the cause and the remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor

SGD = torch.optim.SGD


def low(batch: Any, net: Any, lam: Any) -> Tensor:
    return (net(batch) ** 2).mean() * lam().exp()


def up(batch: Any, net: Any) -> Tensor:
    return (net(batch) - 1).square().mean()


def program(**changes: Any) -> nestor.Program:
    """A bilevel program with some fields of its lower level changed."""
    net, lam = nn.Linear(2, 1), nestor.Variable(torch.tensor(0.0))
    fields = {"module": net, "loss": low, "data": [torch.ones(3, 2)], "optimizer": SGD(net.parameters(), 0.1)}
    upper = nestor.Problem(lam, up, data=[torch.ones(3, 2)], optimizer=SGD(lam.parameters(), 0.1))
    return nestor.Program(net=nestor.Problem(**{**fields, **changes}), lam=upper)


def unknown(batch: Any, net: Any, lamm: Any) -> Tensor:
    raise AssertionError


def starred(batch: Any, *levels: Any) -> Tensor:
    raise AssertionError


def no_batch(net: Any, lam: Any) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": unknown}, "'lamm' is the name of no level.*Did you mean 'lam'"),
        ({"loss": starred}, r"\*levels does not say which levels"),
        ({"loss": no_batch}, "first argument is the batch"),
        ({"optimizer": SGD(nn.Linear(2, 1).parameters(), 0.1)}, "none of the module's parameters"),
        ({"variables": [nn.Parameter(torch.ones(1))]}, "the module does not hold"),
        ({"response": nestor.FirstOrder()}, "'lam'.*gets no gradient.*T1T2"),
        ({"unroll_steps": 0}, "unroll_steps=0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
    ],
)
def test_construction(changes: dict[str, Any], words: str) -> None:
    """ValueError at construction."""
    with pytest.raises(ValueError, match=words) as caught:
        program(**changes)
    if "loss" in changes:
        assert "Level 'net'" in str(caught.value)
        assert f"test_bad_input.py:{changes['loss'].__code__.co_firstlineno}" in str(caught.value)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (lambda params, grads, lam: 0, r"must take \(params, grads, state\)"),
        (lambda params, grads, state, net: 0, "'net' is the name of no level above 'net'.*'lam'"),
        (lambda params, grads, state, lamm: 0, "Did you mean 'lam'"),
        (lambda params, grads, state, **levels: 0, "levels does not say which levels"),
    ],
)
def test_update_that_cannot_be_called(update: Callable[..., Any], words: str) -> None:
    """An update rule may read the levels above; the error says where it is defined."""
    with pytest.raises(ValueError, match=words) as caught:
        program(optimizer=None, update=update)
    assert f"Level 'net', update <lambda> ({__file__}:{update.__code__.co_firstlineno})" in str(caught.value)


def test_values_that_are_no_problem() -> None:
    """Every keyword of a program is a level."""
    with pytest.raises(TypeError, match=r"'steps' must be a nestor\.Problem, got int"):
        nestor.Program(steps=3)  # type: ignore[arg-type]


def test_levels_in_the_wrong_order() -> None:
    """Highest first is told to turn round."""
    net, lam = nn.Linear(2, 1), nestor.Variable(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"listed lowest first.*Program\(net=..., lam=...\)"):
        nestor.Program(lam=nestor.Problem(lam, up, data=[0]), net=nestor.Problem(net, low, data=[0]))


def test_disconnected_level() -> None:
    """A level that nobody reads and that reads nobody."""
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="nothing connects"):
        nestor.Program(
            net=nestor.Problem(net, up, data=[0]),
            other=nestor.Problem(nestor.Variable(torch.ones(1)), lambda other: other().sum()),
        )


RUNS: list[tuple[Callable[..., Any], str]] = [
    (lambda batch, net, lam: net(batch) * lam(), "not a scalar"),
    (lambda batch, net, lam: (net(batch) * lam()).mean().detach(), "no graph"),
    (lambda batch, net, lam: (net(batch) * lam()).mean().item(), "returned float"),
    (lambda batch, net, lam: {"value": (net(batch) * lam()).mean()}, "no 'loss'"),
]


@pytest.mark.parametrize(("loss", "words"), RUNS, ids=[words for _, words in RUNS])
def test_losses_that_cannot_be_minimised(loss: Callable[..., Any], words: str) -> None:
    """A RuntimeError that names level and step, with the parameters as they were."""
    broken = program(loss=loss)
    before = [p.clone() for p in broken.levels["net"].parameters]
    with pytest.raises(nestor.LossError, match=words) as caught:
        nestor.Engine(broken, seed=0).run(1)
    assert "level 'net'" in str(caught.value)
    assert "step 1" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, broken.levels["net"].parameters, strict=True))


def test_empty_loader() -> None:
    """An empty loader is named."""
    with pytest.raises(nestor.NestorError, match=r"level 'net'.*empty"):
        nestor.Engine(program(data=[]), seed=0).run(1)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps(steps: Any) -> None:
    """A step count is a positive integer."""
    with pytest.raises(ValueError, match="positive integer"):
        nestor.Engine(program(), seed=0).run(steps)


def test_engine_needs_optimizers_and_data() -> None:
    """What a program may lack, a run may not."""
    with pytest.raises(ValueError, match="'net' has no optimizer"):
        nestor.Engine(program(optimizer=None))
    with pytest.raises(ValueError, match=r"'net'.*has no data"):
        nestor.Engine(program(data=None))


def test_batches() -> None:
    """A missing batch and an unknown level."""
    with pytest.raises(ValueError, match="needs a batch of level 'net'"):
        program().hypergradient("lam", {"lam": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="no level 'nett'"):
        program().hypergradient("nett")


def test_a_layer_frozen_after_the_program_was_built() -> None:
    """The levels' variables are chosen once: the error names what is frozen."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    tried = program(module=net, optimizer=SGD(net.parameters(), 0.1))
    engine = nestor.Engine(tried, seed=0)
    engine.run(1)
    net[0].requires_grad_(False)
    with pytest.raises(
        nestor.LossError, match=r"level 'net', loss low .*frozen: '0.weight' of level 'net', '0.bias' of"
    ):
        engine.run(1)
    with pytest.raises(nestor.LossError, match=r"level 'lam', loss up .*level below.*frozen"):
        tried.hypergradient("lam", {"net": torch.ones(3, 2), "lam": torch.ones(3, 2)})
