"""Cycles that are taken again at once: what a run computes does not depend on how many are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from nestor.compilation import compiled_loop
from nestor.compilation.plan import Plan

F64 = torch.float64
NEUMANN = nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.1))
WARM = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=2), damping=0.1, warm_start=True)
RESPONSES = {
    "T1T2": nestor.T1T2(),
    "FiniteDifference": nestor.FiniteDifference(),
    "Neumann": NEUMANN,
    "CG, warm": WARM,
    # The largest eigenvalue of the Hessian grows above 2 / 0.5: later solves are truncated, by eager steps.
    "Neumann, truncated": nestor.Implicit(solver=nestor.Neumann(num_terms=4, step_size=0.5)),
}


@pytest.fixture(autouse=True)
def _plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are run as they are traced: what torch's compiler does with them is tested elsewhere."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, examples, **options: graph)


class Runs:
    """Counts the runs of graphs, and those that were repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repeated = 0
        repeat = Plan.repeat

        def counted(plan: Plan, *arguments: Any) -> tuple[int, bool]:
            taken = repeat(plan, *arguments)
            self.repeated += taken[0]
            return taken

        monkeypatch.setattr(Plan, "repeat", counted)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


class Count(nestor.callbacks.Callback):
    """Reads the metrics at every seventh step."""

    def __init__(self) -> None:
        self.read: list[dict[str, float]] = []

    def is_due(self, engine: Any, step: int) -> bool:
        return step % 7 == 0

    def on_step(self, engine: Any) -> None:
        if engine.step % 7 == 0:
            self.read.append(engine.read_metrics())


def program(response: nestor.Response, rows: list[Tensor] | None = None, *, rate: float = 0.1) -> nestor.Program:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=F64)
    y = torch.randn(12, generator=generator, dtype=F64)
    low, up = nestor.Variable(torch.zeros(4, dtype=F64)), nestor.Variable(torch.full((4,), -1.0, dtype=F64))

    def fit(batch: Tensor, low: nestor.Variable, up: nestor.Variable) -> dict[str, Tensor]:
        loss = (x @ low() - y * batch.mean()).square().mean() + (up().exp() * low().square()).sum()
        return {"loss": loss, "size": low().norm(), "count": torch.tensor(len(batch))}

    def judge(low: nestor.Variable) -> Tensor:
        return (x @ low() - y.flip(0)).square().mean()

    rows = rows or [torch.full((3,), 1 + 0.1 * i, dtype=F64) for i in range(3)]
    return nestor.Program(
        low=nestor.Problem(low, fit, data=rows, optimizer=Adam(low.parameters(), lr=rate), response=response),
        up=nestor.Problem(up, judge, optimizer=SGD(up.parameters(), lr=0.05, momentum=0.5)),
    )


def values(engine: nestor.Engine) -> list[Tensor]:
    found = [p.detach().clone() for p in engine.states["low"].level.parameters + engine.states["up"].level.parameters]
    for state in engine.states.values():
        found += [torch.as_tensor(v) for slot in state.memory.copies() for v in slot.values()]
    return found


def run(
    response: nestor.Response, steps: list[int], monkeypatch: pytest.MonkeyPatch, most: int
) -> tuple[nestor.Engine, Count]:
    monkeypatch.setattr(compiled_loop, "MOST_REPEATED", most)
    count = Count()
    engine = nestor.Engine(program(response), seed=0, compile=True, callbacks=[count], check=False)
    for number in steps:
        engine.run(number)
    return engine, count


@pytest.mark.filterwarnings("ignore::nestor.NestorWarning")
@pytest.mark.parametrize("name", RESPONSES)
def test_bits_and_metrics_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """Variables, optimizers' memory, metrics at every seventh step, counters, truncated solves."""
    once, read_once = run(RESPONSES[name], [40], monkeypatch, 0)
    assert runs.repeated == 0
    engine, read = run(RESPONSES[name], [40], monkeypatch, 100)
    assert runs.repeated >= (3 if "truncated" in name else 20)
    assert not engine.eager_reasons
    for found, expected in zip(values(engine), values(once), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert read.read == read_once.read
    assert len(read.read) == 5
    for level, state in engine.states.items():
        other = once.states[level]
        assert (state.steps, state.draws.count, state.ready) == (other.steps, other.draws.count, other.ready)
        for lower, solve in state.solves.items():
            assert int(solve.truncated) == int(other.solves[lower].truncated)
    if name == "Neumann, truncated":
        assert 0 < int(engine.states["up"].solves["low"].truncated) < 40


def test_several_runs_are_one(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    once, _ = run(nestor.T1T2(), [40], monkeypatch, 100)
    in_one = runs.repeated
    parts, _ = run(nestor.T1T2(), [3, 11, 26], monkeypatch, 100)
    assert in_one > 0
    assert in_one < runs.repeated
    for found, expected in zip(values(parts), values(once), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_state_in_the_middle_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint between two stretches holds what the last step has left."""
    once, _ = run(WARM, [40], monkeypatch, 100)
    half, _ = run(WARM, [17], monkeypatch, 100)
    engine = nestor.Engine(program(WARM), seed=0, compile=True, callbacks=[Count()], check=False)
    engine.load_state_dict(half.state_dict())
    engine.run(23)
    for found, expected in zip(values(engine), values(once), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("most", [0, 100])
def test_a_step_that_is_not_finite(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the step at which a single cycle would fail, and nothing of that step remains."""
    monkeypatch.setattr(compiled_loop, "MOST_REPEATED", most)
    rows = [torch.ones(3, dtype=F64) for _ in range(30)]
    rows[25] = rows[25] * torch.inf
    engine = nestor.Engine(program(nestor.T1T2(), rows), seed=0, compile=True, check=False)
    with pytest.raises(nestor.NonFiniteError, match="step 26"):
        engine.run(40)
    assert engine.step == 25
    assert [state.steps for state in engine.states.values()] == [25, 25]
    good = nestor.Engine(program(nestor.T1T2(), rows), seed=0, compile=True, check=False)
    good.run(25)
    for found, expected in zip(values(engine), values(good), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_batches_of_two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other graph is used where a batch needs it, not an eager step."""
    rows = [torch.ones(3, dtype=F64), torch.ones(3, dtype=F64), torch.full((5,), 2.0, dtype=F64)]
    found: list[list[Tensor]] = []
    for most, compile in ((100, True), (0, True), (0, False)):
        monkeypatch.setattr(compiled_loop, "MOST_REPEATED", most)
        engine = nestor.Engine(program(nestor.T1T2(), rows), seed=0, compile=compile, check=False)
        engine.run(31)
        found.append(values(engine))
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)


def test_an_interrupt_leaves_a_whole_state(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    """Variables, memory and counters are those of the last step that was taken."""
    run_graph, calls = Plan.run, [0]

    def interrupted(plan: Plan) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return run_graph(plan)

    engine = nestor.Engine(program(nestor.T1T2()), seed=0, compile=True, check=False)
    monkeypatch.setattr(Plan, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run(60)
    monkeypatch.setattr(Plan, "run", run_graph)
    (taken,) = {state.steps for state in engine.states.values()}
    good = nestor.Engine(program(nestor.T1T2()), seed=0, compile=True, check=False)
    good.run(taken)
    assert taken > 10
    for found, expected in zip(values(engine), values(good), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Rows:
    """Data whose iteration runs code: nothing is repeated unseen."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_only_where_no_code_of_the_user_runs(runs: Runs) -> None:
    given: Any = Rows([torch.ones(3, dtype=F64)])
    nestor.Engine(program(nestor.T1T2(), given), seed=0, compile=True, check=False).run(30)
    assert runs.repeated == 0


@pytest.mark.filterwarnings("ignore::nestor.NestorWarning")
def test_short_solves_of_peers_equal_eager_ones() -> None:
    """Three iterations on an indefinite matrix: where an earlier iterate is better, a graph leaves the step to it."""

    def run(*, compile: bool) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        rows = [(torch.randn(8, 5, dtype=F64), torch.randn(8, 1, dtype=F64)) for _ in range(3)]
        decay, scale = nestor.Variable(torch.full((1,), -3.0, dtype=F64)), nestor.Variable(torch.ones(5, dtype=F64))

        def fit(batch: Any, net: nn.Module, decay: nestor.Variable, scale: nestor.Variable) -> Tensor:
            penalty = sum((p.square().sum() for p in net.parameters()), torch.zeros((), dtype=F64))
            return F.mse_loss(net(batch[0] * scale()), batch[1]) + decay().exp().sum() * penalty

        def judge(batch: Any, net: nn.Module) -> Tensor:
            return F.mse_loss(net(batch[0]), batch[1])

        def judge_scaled(batch: Any, net: nn.Module, scale: nestor.Variable) -> Tensor:
            return F.mse_loss(net(batch[0] * scale()), batch[1])

        solver = nestor.ConjugateGradient(max_steps=3)
        response = nestor.Implicit(solver=solver, damping=0.5, warm_start=True)
        made = nestor.Program(
            net=nestor.Problem(net, fit, data=rows, optimizer=Adam(net.parameters(), 1e-2), response=response),
            decay=nestor.Problem(decay, judge, data=rows[:2], optimizer=Adam(decay.parameters(), 1e-2)),
            scale=nestor.Problem(scale, judge_scaled, data=rows[1:], optimizer=SGD(scale.parameters(), 1e-2)),
        )
        engine = nestor.Engine(made, seed=0, compile=compile, check=False)
        engine.run(40)
        assert engine.eager_reasons == {}
        return torch.cat([p.detach().flatten() for p in (*net.parameters(), decay(), scale())])

    torch.testing.assert_close(run(compile=True), run(compile=False), rtol=1e-11, atol=1e-12)
