"""Steps whose result is not finite: found at that step, in every way of stepping, and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.callbacks import Callback, Checkpoint
from nestor.levels.level import Gradient
from nestor.training.guard import FiniteGuard
from nestor.training.results import Watched

INF = float("inf")
Make = Callable[[Any], torch.optim.Optimizer]

BAD: dict[str, Make] = {
    "adam-eps": lambda p: torch.optim.Adam(p, 0.01, eps=0.0),
    "sgd-inf": lambda p: torch.optim.SGD(p, INF, momentum=0.9),
    "rmsprop-eps": lambda p: torch.optim.RMSprop(p, 0.01, eps=0.0),
    "adagrad-inf": lambda p: torch.optim.Adagrad(p, INF),
    "overflow": lambda p: torch.optim.SGD(p, 3e38),
}


def loss(net: Any) -> Tensor:
    """Has the gradient (2 v_0, 0)."""
    return net()[0] ** 2 + 0 * net()[1]


def build(make: Make, value: tuple[float, ...] = (1.0, 2.0), loss: Callable[..., Tensor] = loss) -> nestor.Program:
    net = nestor.Variable(torch.tensor(value))
    return nestor.Program(net=nestor.Problem(net, loss, optimizer=make(net.parameters())))


def value_of(program: nestor.Program) -> Tensor:
    return program.levels["net"].parameters[0].detach().clone()


def memory_of(program: nestor.Program) -> dict[str, Any]:
    optimizer = program.levels["net"].problem.optimizer
    assert optimizer is not None
    [parameter] = optimizer.param_groups[0]["params"]
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in optimizer.state.get(parameter, {}).items()}


@pytest.mark.parametrize("name", BAD)
def test_a_lost_variable_is_found_at_its_step(name: str) -> None:
    """In the run that takes the step, not one step later; the error says what is lost."""
    program = build(BAD[name], (3.0, 2.0))
    with pytest.raises(nestor.NonFiniteError, match="result of the step is not finite") as raised:
        nestor.Engine(program, seed=0).run(1)
    assert raised.value.step == 1
    assert raised.value.level == "net"
    assert raised.value.lost[0] == "value"
    assert not torch.isfinite(value_of(program)).all()
    assert "as before" not in str(raised.value)
    assert "There is no checkpoint" in str(raised.value)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("good", [0, 3])
def test_keep_last_restores(name: str, good: int) -> None:
    """Variables and optimizer memory bitwise, also of the first step; then the run goes on as if nothing had been."""
    program, other = build(lambda p: torch.optim.Adam(p, 0.01)), build(lambda p: torch.optim.Adam(p, 0.01))
    engine = nestor.Engine(program, seed=0, keep_last=True)
    plain = nestor.Engine(other, seed=0)
    optimizer = program.levels["net"].problem.optimizer
    assert optimizer is not None
    if good:
        engine.run(good)
        plain.run(good)
    before, memory = value_of(program), memory_of(program)
    optimizer.param_groups[0]["lr"] = INF
    with pytest.raises(nestor.NonFiniteError, match="memory are as before the step") as raised:
        engine.run(2)
    assert raised.value.lost == ()
    assert raised.value.step == good + 1
    assert torch.equal(value_of(program), before)
    after = memory_of(program)
    assert after.keys() == memory.keys()
    assert all(torch.equal(after[key], memory[key]) for key in memory)
    optimizer.param_groups[0]["lr"] = 0.01
    engine.run(2)
    plain.run(2)
    assert torch.equal(value_of(program), value_of(other))


def test_keep_last_changes_no_bit() -> None:
    results = []
    for keep in (False, True):
        program = build(lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1))
        nestor.Engine(program, seed=0, keep_last=keep).run(20)
        results.append(value_of(program))
    assert torch.equal(*results)


class Counting(torch.optim.Optimizer):
    """Counts steps in an attribute, and keeps its best loss so far, which is infinite at first."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("best", torch.tensor(INF))
                parameter -= group["lr"] * parameter.grad


def test_an_optimizer_of_ones_own() -> None:
    """Its attributes come back, and what it keeps may be infinite."""
    program = build(Counting)
    engine = nestor.Engine(program, seed=0, keep_last=True)
    engine.run(3)
    engine.state_dict()
    optimizer = program.levels["net"].problem.optimizer
    assert isinstance(optimizer, Counting)
    optimizer.param_groups[0]["lr"] = INF
    with pytest.raises(nestor.NonFiniteError, match=r"Counting\(lr=inf\)"):
        engine.run(1)
    assert optimizer.steps == 3


def test_the_newest_checkpoint_is_named_and_whole(tmp_path: Path) -> None:
    program = build(lambda p: torch.optim.Adam(p, 0.01))
    saver = Checkpoint(tmp_path, every=2, keep=9, asynchronous=False)
    engine = nestor.Engine(program, seed=0, callbacks=[saver])
    engine.run(4)
    good = value_of(program)
    optimizer = program.levels["net"].problem.optimizer
    assert optimizer is not None
    optimizer.param_groups[0]["lr"] = INF
    with pytest.raises(nestor.NonFiniteError) as raised:
        engine.run(4)
    newest = saver.latest()
    assert newest is not None
    assert newest.name == "step-00000004"
    assert str(newest) in str(raised.value)
    again = nestor.Engine(build(lambda p: torch.optim.Adam(p, 0.01)), seed=0, callbacks=[saver])
    again.run(5, resume="latest")
    assert torch.isfinite(value_of(again.program)).all()
    fresh = build(lambda p: torch.optim.Adam(p, 0.01))
    nestor.Engine(fresh, seed=0).run(4)
    assert torch.equal(good, value_of(fresh))


@pytest.mark.parametrize("keep", [False, True])
def test_compiled_steps(keep: bool) -> None:
    """The graph changes nothing; the step that is taken again says what is wrong."""
    program = build(lambda p: torch.optim.Adam(p, 0.01))
    engine = nestor.Engine(program, seed=0, compile=True, keep_last=keep)
    engine.run(4)
    assert not engine.eager_reasons
    before = value_of(program)
    optimizer = program.levels["net"].problem.optimizer
    assert optimizer is not None
    optimizer.param_groups[0]["lr"] = INF
    with pytest.raises(nestor.NonFiniteError, match="result of the step is not finite") as raised:
        engine.run(4)
    assert raised.value.step == 5
    assert raised.value.lost == (() if keep else ("value",))
    assert torch.equal(value_of(program), before) is keep


@pytest.mark.parametrize("compile", [False, True])
def test_infinity_from_the_start_is_no_error(compile: bool) -> None:
    """A mask among the variables: minus infinity on purpose."""
    program = build(lambda p: torch.optim.Adam(p, 0.01), (1.0, 2.0, -INF), lambda net: torch.softmax(net(), dim=0)[0])
    engine = nestor.Engine(program, seed=0, compile=compile)
    engine.run(5)
    engine.state_dict()
    assert value_of(program)[2] == -INF


def test_large_finite_numbers_are_no_error() -> None:
    """The sum of the entries overflows, and so does their norm; all of them are finite."""
    program = build(lambda p: torch.optim.SGD(p, 0.1), (3e38, 3e38), lambda net: net()[0] * 0 + 1.0)
    nestor.Engine(program, seed=0).run(2)
    assert torch.isfinite(value_of(program)).all()


def test_memory_whose_square_overflows_is_lost() -> None:
    """In half precision 300^2 is infinite: Adam's steps would be zero from then on, without a word."""
    net = nestor.Variable(torch.ones(2, dtype=torch.float16))
    adam = torch.optim.Adam(net.parameters(), 1e-4, betas=(0.9, 0.0))
    problem = nestor.Problem(net, lambda net: (300 * net()).float().sum(), optimizer=adam)
    with pytest.raises(nestor.NonFiniteError, match="exp_avg_sq of value") as raised:
        nestor.Engine(nestor.Program(net=problem), seed=0).run(1)
    assert raised.value.lost == ("exp_avg_sq of value",)


@pytest.mark.parametrize("rule", ["update", "tasks"])
def test_rules_and_tasks_lose_nothing(rule: str) -> None:
    """The new values are known before the old ones are overwritten."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    batch = torch.ones(3, 4, 2) if rule == "tasks" else torch.ones(4, 2)
    if rule == "tasks":
        adam = torch.optim.Adam(net.parameters(), 0.01, eps=0.0)
        problem = nestor.Problem(net, zero_for_a_task, optimizer=adam, data=[batch], tasks=3)
    else:
        problem = nestor.Problem(
            net,
            lambda batch, net: net(batch).square().mean(),
            data=[batch],
            update=lambda params, grads, state: ([p / (0 * p) for p in params], state),
        )
    program = nestor.Program(net=problem)
    before = [p.detach().clone() for p in program.levels["net"].parameters]
    with pytest.raises(nestor.NonFiniteError, match="are as before the step") as raised:
        nestor.Engine(program, seed=0).run(1)
    assert raised.value.lost == ()
    assert "weight (tasks 0, 1, 2)" in str(raised.value) or rule == "update"
    for now, then in zip(program.levels["net"].parameters, before, strict=True):
        assert torch.equal(now, then)


def zero_for_a_task(batch: Any, net: nn.Module) -> Tensor:
    return (net(batch) * torch.tensor(0.0)).mean()


@pytest.mark.parametrize("bad", ["loss", "result"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_mask_undoes_the_step_on_a_device(bad: str, steps: int) -> None:
    """What an accelerator does, on CPU tensors: nothing is read before the check, and nothing is lost."""
    program = build(lambda p: torch.optim.Adam(p, 0.01))
    nestor.Engine(program, seed=0).run(max(steps, 1))
    level = program.levels["net"]
    optimizer = level.problem.optimizer
    assert optimizer is not None
    if not steps:
        optimizer.state.clear()
    guard = FiniteGuard()
    guard.watch(level)
    before, memory = value_of(program), memory_of(program)
    gradient = step_gradient(broken=bad == "loss")
    level.parameters[0].grad = gradient.values[0]
    if bad == "result":
        optimizer.param_groups[0]["lr"] = INF
    guard.step(optimizer, level, gradient, 7)
    assert torch.equal(value_of(program), before)
    after = memory_of(program)
    assert all(torch.equal(after[key], memory[key]) for key in memory)
    assert all(torch.isfinite(v).all() for v in after.values())
    text = "The loss is nan" if bad == "loss" else "The result of the step is not finite"
    with pytest.raises(nestor.NonFiniteError, match=text) as raised:
        guard.check()
    assert raised.value.step == 7
    assert "as before the step" in str(raised.value)
    guard.check()


def step_gradient(*, broken: bool) -> Gradient:
    loss = torch.tensor(float("nan") if broken else 1.0)
    values: list[Tensor | None] = [torch.tensor([2.0, 1.0])]
    return Gradient(loss, {}, values, torch.tensor(5.0).sqrt(), {})


def test_counters_of_an_optimizer_stay_on_their_device() -> None:
    """Adam counts on the CPU; an accelerator would have to wait for it."""
    [level] = build(lambda p: torch.optim.Adam(p, 0.01)).levels.values()
    watched = Watched(level, frozenset(["value"]), frozenset(), 1.0)
    there = torch.zeros(2, device="meta")
    assert list(watched.tensors([there], [{"step": torch.ones(()), "exp_avg": there}])) == ["value", "exp_avg of value"]


def test_keep_last_and_a_learned_rate() -> None:
    """The rate stays the variable of the level above, with its value."""
    rate = nestor.Variable(torch.tensor(0.1))
    net = nestor.Variable(torch.tensor([1.0, 2.0]))
    sgd = torch.optim.SGD(net.parameters(), lr=rate.value, momentum=0.9)
    program = nestor.Program(
        net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd, response=nestor.Unrolled()),
        rate=nestor.Problem(rate, lambda net: net().square().sum(), optimizer=torch.optim.SGD(rate.parameters(), 1e-3)),
    )
    engine = nestor.Engine(program, seed=0, keep_last=True)
    engine.run(3)
    before, good = value_of(program), rate.value.detach().clone()
    with torch.no_grad():
        rate.value.fill_(INF)
    with pytest.raises(nestor.NonFiniteError, match=r"level 'net'.*are as before"):
        engine.run(1)
    assert torch.equal(value_of(program), before)
    assert sgd.param_groups[0]["lr"] is rate.value
    assert rate.value.item() == INF
    with torch.no_grad():
        rate.value.copy_(good)
    engine.run(2)
    assert torch.isfinite(value_of(program)).all()


class Breaks(Callback):
    """Writes a NaN into a tensor after the second step."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def on_step(self, engine: Any) -> None:
        if engine.step == 2:
            with torch.no_grad():
                self.tensor.view(-1)[0] = float("nan")


@pytest.mark.parametrize("name", ["weight", "momentum_buffer of 1.weight", "buffer 0.running_var"])
def test_no_checkpoint_holds_what_is_not_finite(name: str, tmp_path: Path) -> None:
    """Also not what a callback or a forward pass has written; the checkpoint before stays the newest one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    program = nestor.Program(
        net=nestor.Problem(net, lambda batch, net: net(batch).square().mean(), optimizer=sgd, data=[torch.randn(4, 2)])
    )
    saver = Checkpoint(tmp_path, every=1, keep=9, asynchronous=False)
    target: Tensor = net[1].weight if name == "weight" else net[0].running_var  # type: ignore[assignment]
    breaks = Breaks(target)
    engine = nestor.Engine(program, seed=0, callbacks=[breaks, saver])
    engine.run(1)
    if name.startswith("momentum"):
        breaks.tensor = sgd.state[net[1].weight]["momentum_buffer"]
    with pytest.raises(nestor.NonFiniteError, match=name) as raised:
        engine.run(3)
    assert "not saved" in str(raised.value)
    assert "step-00000001" in str(raised.value)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001"]


@pytest.mark.parametrize("precision", ["fp16", "fp16 below"])
def test_fp16_that_skips_for_good_is_an_error(precision: str) -> None:
    """Fifty steps in a row at the smallest scale; the level above, which skips the same steps, is not blamed."""
    net, weights = nn.Linear(3, 1), nestor.Variable(torch.zeros(4))
    data = torch.ones(4, 3)
    bad = torch.full((4, 3), float("nan"))

    def train(batch: Any, net: nn.Module, weights: nestor.Variable) -> Tensor:
        return (net(batch).squeeze(1).square() * torch.sigmoid(weights())).mean()

    def judge(batch: Any, net: nn.Module) -> Tensor:
        return net(batch).square().mean()

    below = precision == "fp16 below"
    program = nestor.Program(
        net=nestor.Problem(
            net,
            train,
            optimizer=torch.optim.SGD(net.parameters(), 0.1),
            data=[data if below else bad],
            precision="fp16",
        ),
        weights=nestor.Problem(
            weights,
            judge,
            optimizer=torch.optim.SGD(weights.parameters(), 0.1),
            data=[bad if below else data],
            precision="fp32",
        ),
    )
    before = [p.detach().clone() for p in (net if not below else weights).parameters()]
    engine = nestor.Engine(program, seed=0)
    with pytest.raises(nestor.NonFiniteError, match=f"{74 if below else 50} steps in a row have overflowed") as raised:
        engine.run(1000)
    assert raised.value.level == ("weights" if below else "net")
    assert raised.value.step == (74 if below else 58)
    for now, then in zip((net if not below else weights).parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_fp16_that_recovers_goes_on() -> None:
    """Forty-nine bad steps at the smallest scale, then good ones; a checkpoint in between keeps the count."""
    net = nn.Linear(3, 1)
    batches = [torch.full((4, 3), float("nan"))] * 65 + [torch.ones(4, 3)] * 5

    def engine() -> nestor.Engine:
        problem = nestor.Problem(
            net,
            lambda batch, net: net(batch).square().mean(),
            optimizer=torch.optim.SGD(net.parameters(), 0.1),
            data=batches,
        )
        return nestor.Engine(nestor.Program(net=problem), seed=0, precision="fp16")

    first = engine()
    assert first.run(60)["net/skipped"] == 60
    second = engine()
    second.load_state_dict(first.state_dict())
    assert second.states["net"].level.loss.scaling is not None
    assert float(second.states["net"].level.loss.scaling.stuck) == 44
    assert second.run(10)["net/skipped"] == 65
