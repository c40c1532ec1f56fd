"""Compiled runs whose levels keep more than variables between steps: buffers, solutions, gradients, learned rates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import nestor
from nestor.compilation.compiled_steps import CompiledSteps

F64 = torch.float64
STEPS = 2


@pytest.fixture(autouse=True)
def _plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are run as they are traced: what torch's compiler does with them is tested elsewhere."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, examples, **options: graph)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
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


class Task:
    """A network whose weight decay is learned; with batch norm, it has buffers that both levels' losses read."""

    def __init__(self, response: nestor.Response, optimizer: Callable[..., Any], *, norm: bool = False) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(3, 4), nn.BatchNorm1d(4)] if norm else [nn.Linear(3, 4)]
        self.net = nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 1)).double()
        self.decay = nestor.Variable(torch.full((1,), -2.0, dtype=F64))
        self.rows = [torch.randn(8, 3, dtype=F64) for _ in range(3)]
        self.response, self.optimizer = response, optimizer

    def fit(self, batch: Tensor, low: nn.Module, up: nn.Module) -> Tensor:
        return (low(batch) - batch.sum(1, keepdim=True)).square().mean() + up().exp() * sum(
            p.square().sum() for p in low.parameters()
        )

    def judge(self, batch: Tensor, low: nn.Module) -> Tensor:
        return (low(batch) - 0.5 * batch.sum(1, keepdim=True)).square().mean()

    def engine(self, *, compile: bool, **options: Any) -> nestor.Engine:
        program = nestor.Program(
            low=nestor.Problem(
                self.net,
                self.fit,
                data=self.rows,
                optimizer=self.optimizer(self.net.parameters()),
                response=self.response,
                unroll_steps=STEPS,
            ),
            up=nestor.Problem(
                self.decay, self.judge, data=self.rows[1:], optimizer=Adam(self.decay.parameters(), lr=0.1)
            ),
        )
        return nestor.Engine(program, seed=0, compile=compile, **options)

    def values(self) -> Tensor:
        state = [*self.net.state_dict().values(), self.decay().detach()]
        return torch.cat([t.detach().double().flatten() for t in state])


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


CASES: dict[str, dict[str, Any]] = {
    "SAMA, Adam": {"response": nestor.SAMA(), "optimizer": lambda p: Adam(p, lr=0.05)},
    "SAMA, RMSprop": {"response": nestor.SAMA(), "optimizer": lambda p: RMSprop(p, lr=0.01)},
    "FiniteDifference, reused": {"response": nestor.FiniteDifference(reuse=True), "optimizer": _momentum},
    "warm start": {
        "response": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3), warm_start=True, damping=0.1),
        "optimizer": _momentum,
    },
    "batch norm, T1T2": {"response": nestor.T1T2(), "optimizer": _momentum, "norm": True},
    "batch norm, unrolled": {"response": nestor.Unrolled(), "optimizer": lambda p: AdamW(p, lr=0.05), "norm": True},
    "batch norm, SAMA": {"response": nestor.SAMA(), "optimizer": lambda p: Adam(p, lr=0.05), "norm": True},
}


@pytest.mark.filterwarnings("ignore:Level")
@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case: str, graphs: list[tuple[str, ...]]) -> None:
    """Every cycle but the first one is one graph; variables, buffers and metrics are those of the eager run."""
    eager, compiled = Task(**CASES[case]), Task(**CASES[case])
    expected = eager.engine(compile=False).run(6 * STEPS)
    engine = compiled.engine(compile=True)
    found = engine.run(6 * STEPS)
    assert engine.eager_reasons == {}
    assert graphs == [("low", "low", "up")] * 5
    # Differences have the noise of their step size.
    rtol = 1e-9 if "SAMA" in case or "Difference" in case else 1e-12
    torch.testing.assert_close(compiled.values(), eager.values(), rtol=rtol, atol=1e-13)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Level")
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_same_bits(case: str) -> None:
    """A state of the middle of a compiled run, in a new engine."""
    straight, first, second = Task(**CASES[case]), Task(**CASES[case]), Task(**CASES[case])
    straight.engine(compile=True).run(8 * STEPS)
    begun = first.engine(compile=True)
    begun.last_step = 0
    begun.run(4 * STEPS)
    resumed = second.engine(compile=True)
    resumed.load_state_dict(begun.state_dict())
    resumed.run(4 * STEPS)
    torch.testing.assert_close(second.values(), straight.values(), rtol=0, atol=0)


class _Modes(nestor.callbacks.Callback):
    """Switches the network to eval mode for one cycle of three."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def is_due(self, engine: Any, step: int) -> bool:
        return step % STEPS == 0

    def on_step(self, engine: Any) -> None:
        if engine.step % STEPS == 0:
            self.net.train(engine.step % (3 * STEPS) != 0)


@pytest.mark.filterwarnings("ignore:Level")
def test_the_mode_of_a_module_is_read_at_every_cycle() -> None:
    """A graph of the other mode is another one."""
    runs = []
    for compile in (False, True):
        task = Task(nestor.T1T2(), _momentum, norm=True)
        engine = task.engine(compile=compile, callbacks=[_Modes(task.net)])
        engine.run(9 * STEPS)
        assert engine.eager_reasons == {}
        runs.append(task.values())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-13)


def test_memory_that_is_cleared_before_every_cycle(graphs: list[tuple[str, ...]]) -> None:
    """A level that starts from another one begins every cycle without optimizer memory."""
    runs = []
    for compile in (False, True):
        task = Task(nestor.Unrolled(), _momentum)
        start = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        program = nestor.Program(
            low=nestor.Problem(
                task.net,
                lambda batch, low: (low(batch) - batch.sum(1, keepdim=True)).square().mean(),
                data=task.rows,
                optimizer=Adam(task.net.parameters(), lr=0.05),
                response=nestor.Unrolled(),
                unroll_steps=STEPS,
                init="start",
            ),
            start=nestor.Problem(start, task.judge, data=task.rows, optimizer=Adam(start.parameters(), lr=0.05)),
        )
        engine = nestor.Engine(program, seed=0, compile=compile)
        engine.run(8 * STEPS)
        assert engine.eager_reasons == {}
        runs.append(torch.cat([p.detach().flatten() for p in (*task.net.parameters(), *start.parameters())]))
    assert len(graphs) == 7
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-13)


def test_learned_learning_rates(graphs: list[tuple[str, ...]]) -> None:
    """The learning rate of an optimizer is a variable of the level above."""
    runs = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
        rates = nestor.Variable(torch.tensor([0.05], dtype=F64))
        x, y = torch.randn(8, 3, dtype=F64), torch.randn(8, 1, dtype=F64)

        def fit(net: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (net(x) - y).square().mean()

        program = nestor.Program(
            net=nestor.Problem(
                net,
                fit,
                optimizer=SGD(net.parameters(), lr=rates.value, momentum=0.5),
                response=nestor.Unrolled(),
                unroll_steps=STEPS,
            ),
            rates=nestor.Problem(rates, fit, optimizer=SGD(rates.parameters(), lr=0.01)),
        )
        engine = nestor.Engine(program, seed=0, compile=compile)
        engine.run(6 * STEPS)
        assert engine.eager_reasons == {}
        runs.append(torch.cat([p.detach().flatten() for p in (*net.parameters(), rates())]))
    assert graphs == [("net", "net", "rates")] * 5
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-13)
    assert runs[0][-1] != 0.05
