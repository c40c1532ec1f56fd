"""BestWeights: the variables are bitwise those of the best validation."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.callbacks import BestWeights, Callback

Make = Callable[..., nestor.Engine]


class Witness(Callback):
    """Keeps every level's parameters and buffers at every validation."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def on_validation(self, engine: nestor.Engine, metrics: dict[str, float]) -> None:
        self.seen[engine.step] = state(engine)


def state(engine: nestor.Engine) -> list[Tensor]:
    modules = [level.problem.module for level in engine.program.levels.values()]
    return [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_restores_the_best_validation(make: Make, mode: Any, best: int) -> None:
    """At the end of the run, or by hand, into the engine, the program or another copy of it."""
    scores = iter([3.0, 1.0, 2.0, 5.0, 4.0, float("nan")])
    witness, keeper = Witness(), BestWeights("score", mode, restore=True)
    engine = make(callbacks=[witness, keeper], validate=lambda: {"score": next(scores)}, validate_every=1)
    engine.run(6)
    assert keeper.best_step == best
    assert keeper.best == {"min": 1.0, "max": 5.0}[mode]
    assert equal(state(engine), witness.seen[best])
    assert not equal(state(engine), witness.seen[6])
    other = make()
    keeper.restore(other.program)
    assert equal(state(other), witness.seen[best])
    fresh = BestWeights("score", mode)
    fresh.load_state_dict(copy.deepcopy(keeper.state_dict()))
    again = make()
    fresh.restore(again)
    assert equal(state(again), witness.seen[best])
    assert fresh.best == keeper.best


def test_buffers_come_back() -> None:
    """Running means too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))

    def loss(batch: Tensor, net: Any) -> Tensor:
        return net(batch).square().mean()

    problem = nestor.Problem(net, loss, data=[torch.randn(4, 2) + 3], optimizer=torch.optim.SGD(net.parameters(), 0.1))
    scores = iter([0.0, 1.0, 2.0])
    witness, keeper = Witness(), BestWeights("value", restore=True)
    engine = nestor.Engine(
        nestor.Program(net=problem), callbacks=[witness, keeper], validate=lambda: next(scores), validate_every=1
    )
    engine.run(3)
    assert equal(state(engine), witness.seen[1])
    assert not equal(state(engine), witness.seen[3])


def test_tasks_come_back() -> None:
    """The stacked variables of a level with tasks."""
    torch.manual_seed(0)
    net, init = nestor.Variable(torch.zeros(2)), nestor.Variable(torch.zeros(2))

    def low(batch: Tensor, net: Any, init: Any) -> Tensor:
        return (net() - batch).square().sum() + (net() - init()).square().sum()

    def up(net: Any) -> Tensor:
        return net().square().sum()

    program = nestor.Program(
        net=nestor.Problem(
            net, low, data=[torch.randn(3, 2)], optimizer=torch.optim.SGD(net.parameters(), 0.1), tasks=3
        ),
        init=nestor.Problem(init, up, optimizer=torch.optim.SGD(init.parameters(), 0.1)),
    )
    scores = iter([0.0, 1.0])
    keeper = BestWeights("value")
    engine = nestor.Engine(program, callbacks=[keeper], validate=lambda: next(scores), validate_every=1)
    engine.run(1)
    (before,) = (p.detach().clone() for p in program.levels["net"].parameters)
    engine.run(1)
    assert not torch.equal(program.levels["net"].parameters[0], before)
    keeper.restore(engine)
    assert torch.equal(program.levels["net"].parameters[0], before)


def test_errors(make: Make) -> None:
    """Nothing kept, another program, another metric."""
    with pytest.raises(RuntimeError, match="nothing was kept"):
        BestWeights("score").restore(make())
    with pytest.warns(UserWarning, match="nothing to restore"):
        make(callbacks=[BestWeights("score", restore=True)]).run(1)
    with pytest.raises(ValueError, match=r"no metric 'score'. Known are: 'value'"):
        make(callbacks=[BestWeights("score")], validate=lambda: 1.0).run(1)
    keeper = BestWeights("value")
    make(callbacks=[keeper], validate=lambda: 1.0).run(1)
    net = nestor.Variable(torch.zeros(2))
    other = nestor.Program(net=nestor.Problem(net, lambda net: net().sum()))
    with pytest.raises(ValueError, match="has the levels net; kept were those of net, lam"):
        keeper.restore(other)
