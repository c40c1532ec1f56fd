"""The schedule's table, the hand-written loop, and runs that meet numbers that are not finite."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor


class Letters:
    """Batches that record which level drew them."""

    def __init__(self, name: str, trace: list[str]) -> None:
        self.name, self.trace = name, trace

    def __iter__(self) -> Iterator[int]:
        while True:
            self.trace.append(self.name)
            yield 0


def quadratic(names: list[str]) -> Any:
    namespace: dict[str, Any] = {}
    terms = " + ".join(f"{n}() ** 2 + 0.1 * {names[0]}() * {n}()" for n in names)
    exec(f"def loss(batch, {', '.join(names)}): return ({terms}).sum()", namespace)
    return namespace["loss"]


CASES = [
    ({"a": "b", "b": ""}, {"a": {"unroll_steps": 3}}, "aaabaaaba"),
    ({"a": "b", "b": ""}, {"a": {"unroll_steps": 2, "warmup_steps": 4}}, "aaaaaabaabaab"),
    ({"a": "b", "b": ""}, {"a": {"accumulate": 2}}, "aabaabaab"),
    ({"a": "b", "b": "c", "c": ""}, {"a": {"unroll_steps": 2}, "b": {"unroll_steps": 2}}, "aabaabcaabaabc"),
    ({"a": "bc", "b": "c", "c": ""}, {}, "abcabcabc"),
    ({"a": "c", "b": "c", "c": ""}, {"b": {"unroll_steps": 3}}, "abababcabababc"),
]


@pytest.mark.parametrize(("graph", "options", "order"), CASES, ids=[case[2] for case in CASES])
def test_order_of_steps(graph: dict[str, str], options: dict[str, dict[str, int]], order: str) -> None:
    """Letters are levels in the order in which they draw a batch; edges go from lower to upper."""
    trace: list[str] = []
    reads = {name: [name, *uppers] for name, uppers in graph.items()}
    for name, uppers in graph.items():
        for upper in uppers:
            reads[upper].append(name)
    levels = {}
    for name in graph:
        variable = nestor.Variable(torch.ones(2))
        optimizer = torch.optim.SGD(variable.parameters(), lr=1e-3)
        data = Letters(name, trace)
        levels[name] = nestor.Problem(
            variable, quadratic(reads[name]), optimizer=optimizer, data=data, **options.get(name, {})
        )
    engine = nestor.Engine(nestor.Program(**levels), seed=0)
    while len(trace) < len(order):
        engine.run(1)
    assert "".join(trace)[: len(order)] == order


def weighted(batch: Any, net: Any, weights: Any) -> Tensor:
    x, y, index = batch
    return (torch.sigmoid(weights()[index]) * (net(x).squeeze(1) - y) ** 2).mean()


def clean(batch: Any, net: Any) -> Tensor:
    x, y, _ = batch
    return ((net(x).squeeze(1) - y) ** 2).mean()


def data(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, generator=generator, dtype=torch.float64), torch.arange(rows)


def modules() -> tuple[nn.Module, nestor.Variable]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), nestor.Variable(torch.zeros(8).double())


def test_run_equals_the_loop_written_by_hand() -> None:
    """SGD with momentum below, Adam above, the T1-T2 hypergradient by double backward."""
    net, weights = modules()
    program = nestor.Program(
        net=nestor.Problem(
            net, weighted, data=[data(8, 1)], optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        ),
        weights=nestor.Problem(
            weights, clean, data=[data(6, 2)], optimizer=torch.optim.Adam(weights.parameters(), lr=0.1)
        ),
    )
    nestor.Engine(program, seed=0).run(10)
    by_hand, logits = modules()
    lower = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    upper = torch.optim.Adam(logits.parameters(), lr=0.1)
    for _ in range(10):
        lower.zero_grad()
        weighted(data(8, 1), by_hand, logits).backward()
        lower.step()
        parameters = list(by_hand.parameters())
        v = torch.autograd.grad(clean(data(6, 2), by_hand), parameters)
        g = torch.autograd.grad(weighted(data(8, 1), by_hand, logits), parameters, create_graph=True)
        (h,) = torch.autograd.grad(g, logits.value, v)
        logits.value.grad = -h
        upper.step()
    torch.testing.assert_close(weights.value, logits.value, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("broken", "words"),
    [("lower", "loss is nan"), ("upper", "loss is nan"), ("cotangent", "cotangent"), ("solve", "curvature")],
)
def test_bad_numbers_change_nothing(broken: str, words: str) -> None:
    """The error names level and step; every parameter and every state is bitwise as before the step."""
    net, weights = modules()
    calls = {"lower": 0, "upper": 0}

    def low(batch: Any, net: Any, weights: Any) -> Tensor:
        calls["lower"] += 1
        sign = -1.0 if broken == "solve" else 1.0
        return sign * weighted(batch, net, weights) * (torch.nan if broken == "lower" and calls["lower"] > 11 else 1.0)

    def up(batch: Any, net: Any) -> Tensor:
        calls["upper"] += 1
        value = clean(batch, net)
        if broken == "cotangent" and calls["upper"] > 3:
            return (value * 0).sqrt()
        return value * (torch.nan if broken == "upper" and calls["upper"] > 3 else 1.0)

    strict = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5), strict=True)
    solver = strict if broken == "solve" else nestor.T1T2()
    program = nestor.Program(
        net=nestor.Problem(
            net, low, data=[data(8, 1)], response=solver, optimizer=torch.optim.Adam(net.parameters(), lr=1e-3)
        ),
        weights=nestor.Problem(
            weights, up, data=[data(6, 2)], optimizer=torch.optim.Adam(weights.parameters(), lr=0.1)
        ),
    )
    history: list[dict[str, Any]] = []

    class Watch(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            history.append(state())

    def state() -> dict[str, Any]:
        tensors = [*net.parameters(), weights.value]
        for problem in (level.problem for level in program.levels.values()):
            assert problem.optimizer is not None
            for entry in problem.optimizer.state.values():
                tensors += [v for v in entry.values() if isinstance(v, Tensor)]
        return {str(i): t.detach().clone() for i, t in enumerate(tensors)}

    history.append(state())
    with pytest.raises(nestor.NestorError, match=words) as caught:
        nestor.Engine(program, callbacks=[Watch()], seed=0).run(100)
    level = {"lower": "net", "upper": "weights", "cotangent": "weights", "solve": "net"}[broken]
    assert f"level {level!r}" in str(caught.value)
    assert "step " in str(caught.value)
    now = state()
    assert all(torch.equal(now[key], value) for key, value in history[-1].items())
