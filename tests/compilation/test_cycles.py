"""All steps up to an upper one as one graph: with looks in between, errors in the middle, and other ends."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from nestor.compilation.compiled_steps import CompiledSteps

F64 = torch.float64


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The steps that were taken by one graph each, in order."""
    taken: list[tuple[str, ...]] = []
    take = CompiledSteps.run

    def noted(self: CompiledSteps, names: Any, *arguments: Any) -> bool:
        done = take(self, names, *arguments)
        if done:
            taken.append(tuple(names))
        return done

    monkeypatch.setattr(CompiledSteps, "run", noted)
    return taken


CYCLE = ("low", "low", "low", "up")


class Task:
    """A network whose weight decay is learned; batches that differ."""

    def __init__(self, data: list[Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.decay = nestor.Variable(torch.full((1,), -2.0, dtype=F64))
        self.rows = torch.randn(4, 5, 3, dtype=F64) if data is None else data

    def fit(self, batch: Tensor, low: nn.Module, up: nn.Module) -> Tensor:
        return (low(batch) - 1).square().mean() + up().exp() * sum(p.square().sum() for p in low.parameters())

    def judge(self, batch: Tensor, low: nn.Module) -> dict[str, Tensor]:
        out = low(batch)
        return {"loss": (out - 0.5).square().mean(), "out": out.mean()}

    def engine(
        self,
        *,
        compile: bool,
        response: nestor.Response | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = lambda p: SGD(p, lr=0.1, momentum=0.9),
        schedule: bool = False,
        **options: Any,
    ) -> nestor.Engine:
        lower = optimizer(self.net.parameters())
        program = nestor.Program(
            low=nestor.Problem(
                self.net,
                self.fit,
                data=list(self.rows),
                optimizer=lower,
                scheduler=torch.optim.lr_scheduler.ExponentialLR(lower, 0.9) if schedule else None,
                response=response or nestor.Unrolled(),
                unroll_steps=3,
            ),
            up=nestor.Problem(
                self.decay, self.judge, data=list(self.rows), optimizer=Adam(self.decay.parameters(), lr=0.1)
            ),
        )
        return nestor.Engine(program, seed=0, compile=compile, **options)

    def values(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in (*self.net.parameters(), self.decay())])


def agree(found: Task, expected: Task) -> None:
    torch.testing.assert_close(found.values(), expected.values(), rtol=1e-12, atol=1e-13)


CASES: dict[str, dict[str, Any]] = {
    "unrolled, momentum": {},
    "unrolled, Adam": {"optimizer": lambda p: Adam(p, lr=0.05)},
    "last two of three": {"response": nestor.Unrolled(steps=2)},
    "graphs kept": {"response": nestor.Unrolled(checkpoint="none")},
    "forward mode": {"response": nestor.ForwardUnrolled()},
    "no past": {"response": nestor.T1T2()},
}


@pytest.mark.parametrize("case", CASES)
def test_a_cycle_is_one_graph(case: str, steps: list[tuple[str, ...]]) -> None:
    """The first cycle, which makes the optimizers' states, is eager, and so is what is left at the end."""
    eager, compiled = Task(), Task()
    expected = eager.engine(compile=False, **CASES[case]).run(11)
    engine = compiled.engine(compile=True, **CASES[case])
    found = engine.run(11)
    agree(compiled, eager)
    assert found == pytest.approx(expected, rel=1e-9)
    assert steps == [CYCLE] * 2
    assert engine.eager_reasons == {}
    assert [state.steps for state in engine.states.values()] == [11, 3]


def test_counts_are_those_of_the_eager_run() -> None:
    """A graph makes the evaluations that it was written with, whatever the compiler saves."""
    counts = []
    for compile in (False, True):
        engine = Task().engine(compile=compile, response=nestor.Unrolled(keep_graphs=False))
        engine.run(6)
        with nestor.diagnostics.count_evaluations(engine.program) as found:
            engine.run(6)
        counts.append((found.forwards, found.gradients, found.hvps))
    assert counts[0] == counts[1]


def test_how_far_a_cycle_goes() -> None:
    """Up to the next upper step, from wherever the run stands; not at all where that is too far."""
    engine = Task().engine(compile=False)
    assert engine._loop.schedule.coming(3) == [["low"], ["low"], ["low", "up"]]
    assert engine._loop.schedule.coming(2) == []
    engine.run(2)
    assert engine._loop.schedule.coming(3) == [["low", "up"]]


class Look(nestor.callbacks.Callback):
    """Sees the run when it says so."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[int] = []

    def is_due(self, engine: nestor.Engine, step: int) -> bool:
        return step % self.every == 0

    def on_step(self, engine: nestor.Engine) -> None:
        if engine.step % self.every == 0:
            self.seen.append(engine.step)


@pytest.mark.parametrize(("every", "whole"), [(6, 3), (4, 1), (2, 0)])
def test_nobody_is_passed_over(every: int, whole: int, steps: list[tuple[str, ...]]) -> None:
    """A callback that looks in the middle of a cycle sees the run there: those steps are taken one by one."""
    look, task, eager = Look(every), Task(), Task()
    eager.engine(compile=False).run(12)
    task.engine(compile=True, callbacks=[look]).run(12)
    assert look.seen == list(range(every, 13, every))
    assert steps.count(CYCLE) == whole
    agree(task, eager)


def test_validations_happen_when_they_are_due(steps: list[tuple[str, ...]]) -> None:
    """A validation in the middle of a cycle sees the parameters of that step."""
    seen: list[list[float]] = []
    for compile in (False, True):
        task, values = Task(), []
        options = {"validate": lambda up, values=values: values.append(up().item()) or 0.0, "validate_every": 4}
        task.engine(compile=compile, **options).run(12)
        seen.append(values)
    assert seen[1] == pytest.approx(seen[0], rel=1e-12)
    assert steps.count(CYCLE) == 1


def test_a_built_in_callback_says_when_it_looks(tmp_path: Any, steps: list[tuple[str, ...]]) -> None:
    """Progress and throughput look at the clock, logs are written every so many steps."""
    task = Task()
    log = nestor.callbacks.JSONLines(tmp_path / "log.jsonl", every=6)
    watching = [nestor.callbacks.Progress(), nestor.callbacks.Throughput(), log]
    metrics = task.engine(compile=True, callbacks=watching).run(12)
    assert steps == [CYCLE] * 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) >= 2
    assert metrics["up/loss"] > 0
    rate = watching[1].metrics()["engine/seconds_per_step"]
    assert 0 < rate < 60


@pytest.mark.parametrize("bad", [6, 7, 8])
def test_numbers_that_are_not_finite_in_the_middle(bad: int) -> None:
    """The steps before are taken, that one is not; the run can go on from where it stands."""
    rows = list(torch.randn(9, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(1)))
    broken = [*rows[:bad], torch.full((5, 3), float("nan"), dtype=F64), *rows[bad + 1 :]]
    task = Task(broken)
    # The level above sees good rows only.
    engine = task.engine(compile=True)
    upper = engine.states["up"].draws._stream
    assert upper is not None
    upper.data = rows
    with pytest.raises(nestor.NonFiniteError) as caught:
        engine.run(12)
    assert (caught.value.level, caught.value.step) == ("low", bad + 1)
    assert engine.step == bad
    eager = Task(rows)
    eager.engine(compile=False).run(bad)
    agree(task, eager)


def test_a_state_in_the_middle_of_a_cycle_that_failed() -> None:
    """The batches that were drawn in advance are a part of it."""
    rows = list(torch.randn(9, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(1)))
    task = Task([*rows[:7], torch.full((5, 3), float("nan"), dtype=F64), rows[8]])
    engine = task.engine(compile=True)
    stream = engine.states["up"].draws._stream
    assert stream is not None
    stream.data = rows
    with pytest.raises(nestor.NonFiniteError):
        engine.run(12)
    state = copy.deepcopy(engine.state_dict())
    # The batch after the bad one is drawn next, as in an eager run.
    (left,) = engine.states["low"].draws.prefetched
    assert torch.equal(left[0].batch, rows[8])
    other = Task(rows).engine(compile=False)
    other.load_state_dict(state)
    assert torch.equal(other.states["low"].draws.prefetched[0][0].batch, rows[8])


def test_a_schedule_within_a_cycle_keeps_steps_apart(steps: list[tuple[str, ...]]) -> None:
    """The learning rate of the second step is not known when the first one is taken."""
    task, eager = Task(), Task()
    eager.engine(compile=False, schedule=True).run(9)
    task.engine(compile=True, schedule=True).run(9)
    assert CYCLE not in steps
    agree(task, eager)


def test_one_step_a_run(steps: list[tuple[str, ...]]) -> None:
    """Runs that are shorter than a cycle take steps one by one, by graphs."""
    task, eager = Task(), Task()
    eager.engine(compile=False).run(9)
    engine = task.engine(compile=True)
    for _ in range(9):
        engine.run(1)
    assert ("low",) in steps
    assert CYCLE not in steps
    agree(task, eager)


def test_levels_that_look_back_over_several_cycles(steps: list[tuple[str, ...]]) -> None:
    """Steps that a later level looks back on are not in a graph that forgets them."""

    def make(compile: bool) -> tuple[nestor.Engine, list[Tensor]]:
        torch.manual_seed(0)
        past, low, mid, top = (nestor.Variable(torch.randn(2, dtype=F64)) for _ in range(4))
        program = nestor.Program(
            past=nestor.Problem(
                past,
                lambda past, top: (past() - top()).square().sum() + 0.1 * past().pow(4).sum(),
                optimizer=SGD(past.parameters(), lr=0.1, momentum=0.5),
                response=nestor.Unrolled(),
            ),
            low=nestor.Problem(
                low,
                lambda low, mid: (low() - mid().sin()).square().sum(),
                optimizer=SGD(low.parameters(), lr=0.1),
                response=nestor.Unrolled(),
            ),
            mid=nestor.Problem(
                mid,
                lambda mid, low: (low() - 1).square().sum() + 0.1 * mid().square().sum(),
                optimizer=SGD(mid.parameters(), lr=0.1),
                unroll_steps=2,
            ),
            top=nestor.Problem(
                top,
                lambda top, past, mid: (past() * mid().detach()).sum() + top().square().sum(),
                optimizer=SGD(top.parameters(), lr=0.1),
            ),
        )
        return nestor.Engine(program, seed=0, compile=compile), [v() for v in (past, low, mid, top)]

    eager, expected = make(False)
    compiled, found = make(True)
    eager.run(12)
    compiled.run(12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert compiled.eager_reasons == {}
