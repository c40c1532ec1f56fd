"""EMA: the averages are those of torch's AveragedModel, wherever the run takes them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nestor
from nestor.callbacks import EMA, BestWeights, Callback, Checkpoint

Make = Callable[..., nestor.Engine]


class Reference(Callback):
    """Averages the modules of both levels with torch, after every step."""

    def __init__(self, decay: float, every: int = 1, *, buffers: bool = False) -> None:
        self.decay, self.every, self.buffers = decay, every, buffers
        self.models: dict[str, AveragedModel] = {}
        self.counts: dict[str, int] = {}

    def on_step(self, engine: Any) -> None:
        for name, state in engine.states.items():
            if engine.step % self.every or state.steps == self.counts.get(name, 0):
                continue
            self.counts[name] = state.steps
            module = state.level.problem.module
            if name not in self.models:
                average = get_ema_multi_avg_fn(self.decay)
                self.models[name] = AveragedModel(module, multi_avg_fn=average, use_buffers=self.buffers)
            self.models[name].update_parameters(module)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("compile", [False, True])
def test_equals_the_average_of_torch(make: Make, every: int, compile: bool) -> None:
    """Bitwise, for both levels; the run itself does not change by a bit."""
    ema, reference = EMA(0.9, every=every), Reference(0.9, every)
    engine = make(callbacks=[ema, reference], compile=compile)
    engine.run(11)
    for name in ("net", "lam"):
        averaged = ema.module(name)
        assert same(averaged, reference.models[name].module)
        assert not same(averaged, engine.program.levels[name].problem.module)
    plain = make()
    if not compile:
        plain.run(11)
        for name, level in plain.program.levels.items():
            assert same(level.problem.module, engine.program.levels[name].problem.module)


def test_warmup_and_levels(make: Make) -> None:
    """The decay of the update n + 1 is (1 + n) / (10 + n) as long as that is below ``decay``."""
    seen: list[Tensor] = []

    class Sees(Callback):
        def on_step(self, engine: Any) -> None:
            seen.append(engine.states["net"].level.parameters[0].detach().clone())

    ema = EMA(0.3, levels="net", warmup=True)
    make(callbacks=[ema, Sees()]).run(6)
    expected = seen[0]
    for count, value in enumerate(seen[1:], start=1):
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.module("net").weight, nn.Parameter(expected), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="EMA averages the levels net, not 'lam'"):
        ema.module("lam")


def norm_net() -> tuple[nn.Module, nestor.Program]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    data = [torch.randn(4, 2) + 3, torch.randn(4, 2)]
    problem = nestor.Problem(net, lambda batch, net: net(batch).square().mean(), data=data, optimizer=sgd)
    return net, nestor.Program(net=problem)


@pytest.mark.parametrize("buffers", [False, True])
def test_buffers(buffers: bool) -> None:
    """Averaged with ``buffers``; otherwise those of the module."""
    net, program = norm_net()
    ema, reference = EMA(0.9, buffers=buffers), Reference(0.9, buffers=buffers)
    nestor.Engine(program, callbacks=[ema, reference], seed=0).run(5)
    found, expected = ema.module("net"), reference.models["net"].module
    for (name, ours), (_, theirs) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        if ours.is_floating_point():  # torch converts the average of an integer back, nestor takes the present one
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
            assert torch.equal(ours, net.get_buffer(name)) is not buffers


def test_apply_copies_into_the_modules(make: Make) -> None:
    ema = EMA(0.5)
    engine = make(callbacks=[ema])
    engine.run(5)
    averaged = {name: ema.module(name) for name in engine.states}
    ema.apply(engine)
    for name, level in engine.program.levels.items():
        assert same(level.problem.module, averaged[name])


@pytest.mark.parametrize("fails", [False, True])
def test_validation_sees_the_averages(make: Make, fails: bool) -> None:
    """And the run goes on with its own variables, also if the validation raises."""
    ema, reference = EMA(0.5, validate=True), Reference(0.5)
    best = BestWeights("weight", mode="max")
    seen: list[Tensor] = []

    def validate(net: nn.Linear) -> dict[str, float]:
        seen.append(net.weight.detach().clone())
        if fails and len(seen) == 2:
            raise KeyError("broken")
        return {"weight": float(len(seen))}

    engine = make(callbacks=[best, ema, reference], validate=validate, validate_every=2)
    if fails:
        with pytest.raises(KeyError):
            engine.run(6)
    else:
        engine.run(6)
        assert torch.equal(seen[-1], reference.models["net"].module.weight)
        best.restore(other := make())
        assert torch.equal(other.program.levels["net"].parameters[0], seen[-1])
    plain = make()
    plain.run(4 if fails else 6)
    for name, level in plain.program.levels.items():
        assert same(level.problem.module, engine.program.levels[name].problem.module)


def test_resumes_bitwise(make: Make, tmp_path: Path) -> None:
    """From a checkpoint in a new process, and by loading a state in place."""
    whole = EMA(0.9, every=2)
    make(callbacks=[whole]).run(10)
    make(callbacks=[EMA(0.9, every=2), Checkpoint(tmp_path, every=5)]).run(5)
    resumed = EMA(0.9, every=2)
    engine = make(callbacks=[resumed, Checkpoint(tmp_path, every=5)])
    engine.run(10, resume="latest")
    for name in engine.states:
        assert same(whole.module(name), resumed.module(name))
    ema = EMA(0.9, every=2)
    engine = make(callbacks=[ema])
    engine.run(5)
    state = copy.deepcopy(engine.state_dict())
    engine.run(5)
    engine.load_state_dict(state)
    engine.run(5)
    for name in engine.states:
        assert same(whole.module(name), ema.module(name))


def test_a_loaded_state_is_a_copy(make: Make) -> None:
    ema = EMA(0.9)
    engine = make(callbacks=[ema])
    engine.run(3)
    state = copy.deepcopy(ema.state_dict())
    kept = copy.deepcopy(state)
    ema.load_state_dict(state)
    engine.run(3)
    for name in state:
        assert all(torch.equal(a, b) for a, b in zip(state[name]["values"], kept[name]["values"], strict=True))


def test_tasks() -> None:
    """One averaged module for each task."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    batch = torch.randn(3, 4, 2)
    problem = nestor.Problem(
        net,
        lambda batch, net: (net(batch) - 1).square().mean(),
        data=[batch],
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        tasks=3,
    )
    seen: list[Tensor] = []

    class Sees(Callback):
        def on_step(self, engine: Any) -> None:
            seen.append(engine.states["net"].level.parameters[0].detach().clone())

    ema = EMA(0.5)
    program = nestor.Program(net=problem)
    engine = nestor.Engine(program, callbacks=[ema, Sees()], seed=0)
    engine.run(3)
    expected = 0.5 * (0.5 * seen[0] + 0.5 * seen[1]) + 0.5 * seen[2]
    copies = ema.copies("net")
    torch.testing.assert_close(torch.stack([m.weight for m in copies]), expected, rtol=1e-6, atol=0)
    assert torch.equal(program.levels["net"].parameters[0], seen[2])
    with pytest.raises(ValueError, match=r"EMA\.copies"):
        ema.module("net")
    ema.apply(engine)
    torch.testing.assert_close(program.levels["net"].parameters[0].detach(), expected, rtol=1e-6, atol=0)


def test_half_precision_is_averaged_in_single() -> None:
    """A decay of .999 would not move an average in bfloat16."""
    net = nestor.Variable(torch.ones(2, dtype=torch.bfloat16))
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    ema = EMA(0.999)
    engine = nestor.Engine(
        nestor.Program(net=nestor.Problem(net, lambda net: net().float().sum(), optimizer=sgd)), callbacks=[ema]
    )
    engine.run(1)
    with torch.no_grad():
        net.value.zero_()
    engine.run(500)
    assert ema.module("net").value.dtype == torch.bfloat16
    assert ema.module("net").value[0].item() == pytest.approx(0.999**500, rel=1e-2)


def test_what_is_refused(make: Make) -> None:
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"EMA\(decay="):
            EMA(decay)
    with pytest.raises(ValueError, match="every"):
        EMA(every=0)
    with pytest.raises(ValueError, match=r"EMA\(levels=\['nett'\]\): the levels of the program are net, lam"):
        make(callbacks=[EMA(levels=["nett"])]).run(1)
    with pytest.raises(RuntimeError, match="has averaged no step of level 'net' yet"):
        EMA().module("net")
    ema = EMA(every=5)
    make(callbacks=[ema]).run(3)
    with pytest.raises(RuntimeError, match="has averaged no step"):
        ema.module("net")
