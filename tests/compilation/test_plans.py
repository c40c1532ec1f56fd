"""Plans: arguments that stay in place from cycle to cycle, and everything that may change under them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from nestor.compilation.plan import Plan
from nestor.data.random_numbers import Seeded

F64 = torch.float64
STEPS = 2


@pytest.fixture(autouse=True)
def _plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are run as they are traced: what torch's compiler does with them is tested elsewhere."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, examples, **options: graph)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that the arguments of a graph were packed."""
    calls: list[None] = []
    pack = Plan.pack

    def counted(self: Plan, *arguments: Any) -> Any:
        calls.append(None)
        return pack(self, *arguments)

    monkeypatch.setattr(Plan, "pack", counted)
    return calls


class Change(nestor.callbacks.Callback):
    """Calls a function after every cycle, and reads the metrics of some."""

    def __init__(self, function: Callable[[int], object]) -> None:
        self.function = function
        self.read: list[dict[str, float]] = []

    def is_due(self, engine: Any, step: int) -> bool:
        return step % STEPS == 0

    def on_step(self, engine: Any) -> None:
        if engine.step % STEPS == 0:
            with torch.no_grad():
                self.function(engine.step // STEPS)
            if engine.step % (3 * STEPS) == 0:
                self.read.append(engine.read_metrics())


class Task:
    """A network with square weights, whose weight decay is learned."""

    def __init__(self, rows: list[Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        self.decay = nestor.Variable(torch.full((1,), -2.0, dtype=F64))
        self.rows = [torch.randn(5, 3, dtype=F64) for _ in range(3)] if rows is None else rows
        self.lower = Adam(self.net.parameters(), lr=0.05)
        self.upper = SGD(self.decay.parameters(), lr=0.1, momentum=0.5)

    def fit(self, batch: Tensor, low: nn.Module, up: nn.Module) -> dict[str, Tensor]:
        out = low(batch)
        penalty = up().exp() * sum(p.square().sum() for p in low.parameters())
        return {"loss": (out - 1).square().mean() + penalty.sum(), "out": out.mean()}

    def judge(self, batch: Tensor, low: nn.Module) -> Tensor:
        return (low(batch) - 0.5).square().mean()

    def run(self, change: Callable[[int], object], cycles: int, *, compile: bool) -> tuple[nestor.Engine, Change]:
        program = nestor.Program(
            low=nestor.Problem(
                self.net,
                self.fit,
                data=self.rows,
                optimizer=self.lower,
                response=nestor.Unrolled(),
                unroll_steps=STEPS,
            ),
            up=nestor.Problem(self.decay, self.judge, data=self.rows[:3], optimizer=self.upper),
        )
        callback = Change(change)
        engine = nestor.Engine(program, seed=0, compile=compile, callbacks=[callback], check=False)
        engine.run(cycles * STEPS)
        assert engine.eager_reasons == {}
        return engine, callback

    def values(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in (*self.net.parameters(), self.decay())])


def _nothing(task: Task) -> Callable[[int], object]:
    return lambda cycle: None


def _rate(task: Task) -> Callable[[int], object]:
    return lambda cycle: task.lower.param_groups[0].update(lr=0.05 / cycle)


def _constant(task: Task) -> Callable[[int], object]:
    return lambda cycle: task.upper.param_groups[0].update(momentum=0.3 if cycle > 5 else 0.5)


def _restored(task: Task) -> Callable[[int], object]:
    kept: list[Any] = []

    def change(cycle: int) -> None:
        if cycle == 4:
            kept.append(copy.deepcopy(task.lower.state_dict()))
        if cycle == 7:
            task.lower.load_state_dict(kept[0])

    return change


def _one_slot(task: Task) -> Callable[[int], object]:
    def change(cycle: int) -> None:
        if cycle == 6:
            slot = task.lower.state[task.net[0].weight]
            slot["exp_avg"] = torch.zeros_like(slot["exp_avg"])

    return change


def _other_memory(task: Task) -> Callable[[int], object]:
    def change(cycle: int) -> None:
        weight = task.net[0].weight
        if cycle == 5:
            weight.data = weight.data.clone()
        if cycle == 7:
            weight.data = weight.data.t().contiguous().t()

    return change


def _in_place(task: Task) -> Callable[[int], object]:
    return lambda cycle: task.net[0].weight.clamp_(-0.4, 0.4)


@pytest.mark.parametrize("make", [_nothing, _rate, _constant, _restored, _one_slot, _other_memory, _in_place])
def test_changes_between_cycles(make: Callable[[Task], Callable[[int], object]]) -> None:
    """Of learning rates, constants, the state of an optimizer, and the memory of a variable; metrics are the same."""
    eager, compiled = Task(), Task()
    _, expected = eager.run(make(eager), 10, compile=False)
    _, found = compiled.run(make(compiled), 10, compile=True)
    torch.testing.assert_close(compiled.values(), eager.values(), rtol=1e-12, atol=1e-13)
    assert len(found.read) == 3
    for a, b in zip(found.read, expected.read, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_arguments_are_packed_twice(packed: list[None]) -> None:
    """For the compilation, and for the second trace; a schedule of the learning rate needs no other graph."""
    task = Task()
    task.run(_rate(task), 10, compile=True)
    assert len(packed) == 2


def test_batches_of_two_shapes(packed: list[None]) -> None:
    """Each shape has a graph; where the shape changes, the arguments are packed again."""
    rows = [torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (5, 5, 5, 4)]
    eager, compiled = Task(rows), Task(rows)
    eager.run(_nothing(eager), 12, compile=False)
    compiled.run(_nothing(compiled), 12, compile=True)
    torch.testing.assert_close(compiled.values(), eager.values(), rtol=1e-12, atol=1e-13)
    assert len(packed) > 2


def test_seeds_are_computed_when_they_are_used() -> None:
    """And once."""
    calls: list[int] = []

    def seed_of(index: int) -> int:
        calls.append(index)
        return 10 * index

    seeded = Seeded(3, seed_of)
    assert calls == []
    assert (seeded.seed, seeded.seed, calls) == (30, 30, [3])
    assert Seeded(7).seed == 7
