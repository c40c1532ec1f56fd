"""Unrolled(): the graphs of small steps are kept, from the second upper step on, and give the same derivatives."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.callbacks import Callback
from nestor.checkpoints.folder import pack, unpack
from nestor.diagnostics import count_evaluations
from nestor.optim import kept_graphs

STEPS, CYCLES = 4, 4


class Heads(nn.Module):
    """Attention, whose fused kernel has no second derivative: a graph is built by other kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unsqueeze(2))
        return (tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x.view(len(x), 2, 2))[0][:, -1]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU()),
    "BatchNorm and dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4)),
    "attention": Heads,
    "LSTM": Recurrent,
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Softplus()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.SELU(), nn.Flatten()
    ),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
}


def data(batches: int = 5) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)), torch.randperm(10)[:6]) for _ in range(batches)]


def build(
    keep_graphs: bool | None,
    body: str = "MLP",
    optimizer: str = "Adam",
    batches: Any = None,
    window: int | None = None,
    **options: Any,
) -> tuple[nestor.Program, nestor.Variable]:
    """Weights of samples and the strength of a penalty are learned."""
    torch.manual_seed(0)
    net = nn.Sequential(BODIES[body](), nn.Linear(8, 3)).double()
    weights = nestor.Variable(torch.zeros(11).double())

    def fit(batch: Any, net: nn.Module, weights: nestor.Variable) -> Tensor:
        x, y, rows = batch
        penalty = sum(p.square().sum() for p in net.parameters())
        losses = F.cross_entropy(net(x), y, reduction="none")
        return (torch.sigmoid(weights()[rows]) * losses).mean() + 1e-2 * weights()[10].exp() * penalty

    def judge(batch: Any, net: nn.Module) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(net(x), y)

    response = nestor.Unrolled(steps=window, keep_graphs=keep_graphs)
    options = {"unroll_steps": STEPS, **options}
    return nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            data=batches or data(),
            optimizer=OPTIMIZERS[optimizer](net.parameters()),
            response=response,
            **options,
        ),
        weights=nestor.Problem(weights, judge, data=data(2), optimizer=torch.optim.SGD(weights.parameters(), 1.0)),
    ), weights


def end(*arguments: Any, cycles: int = CYCLES, **options: Any) -> tuple[Tensor, int]:
    """The learned weights after some upper steps, and the number of evaluations of the lower loss."""
    program, weights = build(*arguments, **options)
    engine = nestor.Engine(program, seed=0)
    with count_evaluations(program) as count:
        engine.run(cycles * STEPS)
    return weights().detach().clone(), count.forwards["net"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kept_graphs_give_the_same_run(body: str, optimizer: str) -> None:
    replayed, twice = end(False, body, optimizer)
    kept, once = end(None, body, optimizer)
    torch.testing.assert_close(kept, replayed, rtol=1e-10, atol=1e-13)
    assert twice == 2 * CYCLES * STEPS
    assert once == (CYCLES + 1) * STEPS  # the first cycle is replayed, and compared with the run


def third_cycle(body: str, optimizer: str, shift: float) -> tuple[float, Tensor]:
    """The upper loss after a third cycle that begins at shifted upper variables, and its hypergradient."""
    program, weights = build(None, body, optimizer, clip_norm=1.0)
    engine = nestor.Engine(program, seed=0)
    engine.run(2 * STEPS)
    assert engine.states["net"].kept.graphs
    with torch.no_grad():
        weights.value.add_(shift)
    before = weights().detach().clone()
    metrics = engine.run(STEPS)
    return metrics["weights/loss"], before - weights().detach()


@pytest.mark.parametrize("body", ["BatchNorm and dropout", "attention", "LSTM", "convolution"])
@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
def test_the_derivative_of_kept_graphs_is_that_of_the_cycle(body: str, optimizer: str) -> None:
    """A finite difference of the cycle that is run again from shifted upper variables."""
    step = 1e-5
    _, found = third_cycle(body, optimizer, 0.0)
    plus, minus = (third_cycle(body, optimizer, sign * step)[0] for sign in (1, -1))
    assert found.sum().item() == pytest.approx((plus - minus) / (2 * step), rel=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 2},
        {"window": 9},
        {"accumulate": 2, "clip_norm": 0.3},
        {"warmup_steps": 2 * STEPS},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_kept_graphs_under_options(options: dict[str, Any]) -> None:
    (replayed, _), (kept, _), (always, _) = (end(keep, **options) for keep in (False, None, True))
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if "precision" in options else {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(kept, replayed, **tolerance)
    torch.testing.assert_close(always, replayed, **tolerance)


def test_the_graphs_of_a_window_alone_are_kept() -> None:
    program, _ = build(True, window=2)
    engine = nestor.Engine(program, seed=0)
    graphs = []

    class Look(Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            if level == "net":
                history = engine.states["net"].present_history()
                graphs.append([step.graph is not None for step in history.steps][-2:])

    engine.callbacks = (Look(),)
    engine.run(2 * STEPS)
    assert graphs == [[False], [False, False], [False, True], [True, True]] * 2


def test_asked_for_graphs_are_kept_from_the_first_step_on() -> None:
    assert end(True)[1] == CYCLES * STEPS


@pytest.mark.parametrize("cut", [STEPS - 1, STEPS + 2, 2 * STEPS, 2 * STEPS + 1])
@pytest.mark.parametrize("body", ["attention", "BatchNorm and dropout"])
def test_a_resumed_run_has_the_same_bits(cut: int, body: str) -> None:
    """A graph is not saved: the steps since a level above has stepped are replayed, with the same kernels."""
    expected, _ = end(None, body, cycles=4)
    first, _ = build(None, body)
    engine = nestor.Engine(first, seed=0)
    engine.run(cut)
    second, weights = build(None, body)
    resumed = nestor.Engine(second, seed=1)
    resumed.load_state_dict(unpack(pack(engine.state_dict())))
    assert resumed.states["net"].kept.graphs is engine.states["net"].kept.graphs
    resumed.run(4 * STEPS - cut)
    assert torch.equal(weights().detach(), expected)


def test_large_graphs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is larger than the state, in many steps."""
    monkeypatch.setattr(kept_graphs, "SMALL", 0)
    large = [tuple(torch.cat([part] * 40) for part in batch) for batch in data()]
    assert end(None, batches=large)[1] == 2 * CYCLES * STEPS
    assert end(True, batches=large)[1] == CYCLES * STEPS


def test_offloaded_states_keep_no_graphs_unless_told_to() -> None:
    counts = []
    for keep_graphs in (None, True):
        program, _ = build(keep_graphs)
        problems = {name: level.problem for name, level in program.levels.items()}
        response = nestor.Unrolled(offload_to="cpu", keep_graphs=keep_graphs)
        program = nestor.Program(**{**problems, "net": replace(problems["net"], response=response)})
        with count_evaluations(program) as count:
            nestor.Engine(program, seed=0).run(3 * STEPS)
        counts.append(count.forwards["net"])
    assert counts == [6 * STEPS, 3 * STEPS]


class Refilled:
    """A loader that writes each batch into the same tensors."""

    def __init__(self) -> None:
        self.batch = tuple(part.clone() for part in data(1)[0])

    def __iter__(self) -> Iterator[Any]:
        for batch in data():
            for held, new in zip(self.batch, batch, strict=True):
                held.copy_(new)
            yield self.batch


@pytest.mark.parametrize("keep_graphs", [None, True, False])
def test_batches_that_are_written_over_are_refused(keep_graphs: bool | None) -> None:
    with pytest.raises(nestor.NestorError, match="level 'net'"):
        end(keep_graphs, batches=Refilled())


class LateDecay(Callback):
    """Changes a tensor that the loss reads, from some step on."""

    def __init__(self, tensor: Tensor, *, through_data: bool) -> None:
        self.tensor, self.through_data, self.has_begun = tensor, through_data, False

    def on_level_step(self, engine: nestor.Engine, level: str) -> None:
        if self.has_begun and level == "net":
            (self.tensor.data if self.through_data else self.tensor).mul_(0.9)


def taught(response: nestor.Response, teacher: Tensor) -> nestor.Program:
    """A level whose loss reads a tensor from outside of its arguments."""
    torch.manual_seed(0)
    net, weights = nn.Linear(4, 1).double(), nestor.Variable(torch.zeros(6).double())
    x, _, _ = data(1)[0]

    def fit(net: nn.Module, weights: nestor.Variable) -> Tensor:
        return (torch.sigmoid(weights()) * (net(x) * teacher - 1.0).square().squeeze(1)).mean()

    def judge(net: nn.Module) -> Tensor:
        return (net(x) - 2.0).square().mean()

    sgd = torch.optim.SGD(net.parameters(), 0.1)
    return nestor.Program(
        net=nestor.Problem(net, fit, optimizer=sgd, unroll_steps=STEPS, response=response),
        weights=nestor.Problem(weights, judge, optimizer=torch.optim.SGD(weights.parameters(), 1.0)),
    )


@pytest.mark.parametrize("cycles", [0, 1, 2, 3])
@pytest.mark.parametrize("through_data", [True, False])
@pytest.mark.parametrize(
    "response",
    [*(nestor.Unrolled(keep_graphs=k) for k in (None, True, False)), nestor.Unrolled(checkpoint="none")],
    ids=repr,
)
def test_a_tensor_that_begins_to_move_is_refused(response: nestor.Response, through_data: bool, cycles: int) -> None:
    """In the cycle in which it does. Its graph would hold the last value, if it is moved through ``data`` silently."""
    decay = LateDecay(teacher := torch.ones(6, 1).double(), through_data=through_data)
    engine = nestor.Engine(taught(response, teacher), seed=0, callbacks=[decay])
    if cycles:
        engine.run(cycles * STEPS)
    decay.has_begun = True
    with pytest.raises(nestor.ReplayError, match="level 'net'"):
        engine.run(STEPS)


def test_the_error_of_a_tensor_that_was_written_into() -> None:
    """T1T2(reuse=True) has no replay that could be compared; torch sees that the graph is not that of the step."""
    decay = LateDecay(teacher := torch.ones(6, 1).double(), through_data=False)
    decay.has_begun = True
    with pytest.raises(nestor.LossError, match=r"level 'net'.*changed in place"):
        nestor.Engine(taught(nestor.T1T2(reuse=True), teacher), seed=0, callbacks=[decay]).run(STEPS)


@pytest.mark.filterwarnings("ignore:Engine.compile=True")
@pytest.mark.parametrize("unroll_steps", [STEPS, 12])
def test_compiled_runs_agree(unroll_steps: int) -> None:
    """In cycles that are one graph, and in longer ones: compiled steps keep no graphs, and give the same numbers."""
    ends = []
    for keep_graphs, compile in ((None, False), (None, True), (True, True), (False, True)):
        program, weights = build(keep_graphs, unroll_steps=unroll_steps)
        nestor.Engine(program, seed=0, compile=compile).run(4 * unroll_steps)
        ends.append(weights().detach().clone())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-11, atol=1e-13)


def test_graphs_that_are_kept_and_not_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_graphs=False"):
        nestor.Unrolled(checkpoint="none", keep_graphs=False)


def two_uppers(keep_graphs: bool | None) -> Tensor:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    a, b = nestor.Variable(torch.zeros(6).double()), nestor.Variable(torch.zeros(3).double())
    x, y, _ = data(1)[0]

    def fit(net: nn.Module, a: nestor.Variable, b: nestor.Variable) -> Tensor:
        return (a().sigmoid() * F.cross_entropy(net(x) * b().exp(), y, reduction="none")).mean()

    def judge(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(x.flip(1)), y)

    program = nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            optimizer=torch.optim.Adam(net.parameters(), 0.05),
            unroll_steps=STEPS,
            response=nestor.Unrolled(keep_graphs=keep_graphs),
        ),
        a=nestor.Problem(a, judge, optimizer=torch.optim.SGD(a.parameters(), 1.0)),
        b=nestor.Problem(b, judge, optimizer=torch.optim.SGD(b.parameters(), 1.0)),
    )
    nestor.Engine(program, seed=0).run(4 * STEPS)
    return torch.cat([a().detach(), b().detach()])


def test_two_levels_above_read_the_same_graphs() -> None:
    """A graph is pulled back through twice, and is not used after a level above has stepped."""
    replayed = two_uppers(False)
    assert replayed.abs().min() > 0
    for keep_graphs in (None, True):
        torch.testing.assert_close(two_uppers(keep_graphs), replayed, rtol=1e-10, atol=1e-13)


def test_explain_says_what_is_kept() -> None:
    program, _ = build(None)
    batches = {"net": data()[0], "weights": data()[1]}
    told = program.explain(batches)
    costs = {row.level: row.cost for row in told.rows}
    assert told.memory is not None
    assert list(told.memory.graphs) == ["net"]
    assert "graphs of steps kept" in str(told)
    engine = nestor.Engine(program, seed=0)
    engine.run(2 * STEPS)
    with count_evaluations(program) as count:
        engine.run(STEPS)
    upper = costs["weights"]
    assert count.forwards["net"] == STEPS + upper.forwards["net"] == STEPS
    assert count.hvps["net"] == upper.hvps["net"] == STEPS
    without = {row.level: row.cost for row in program.explain().rows}["weights"]
    assert without.forwards["net"] == STEPS  # no batch shows that the graphs are small
    never, _ = build(False)
    memories = [p.explain(batches).memory for p in (program, never)]
    assert memories[0].held > memories[1].held
    assert memories[1].graphs == []
