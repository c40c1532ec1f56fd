"""Iterative differentiation: against finite differences of runs that are run again, and against one full graph."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.autodiff.objective import Objective
from nestor.diagnostics import count_evaluations
from nestor.optim import functional_step, kept_graphs
from nestor.optim.history import LevelHistory, StepRecord
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate
from nestor.responses.unrolling.reverse_sweep import ReverseSweep
from nestor.responses.unrolling.trajectory import Trajectory

CHECKPOINTS = ["none", "step", "sqrt", "tree"]


class Net(nn.Module):
    """Dropout, BatchNorm and a buffer that moves and matters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
        self.register_buffer("center", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Predict around a moving center."""
        y = self.body(x) + self.center
        if self.training:
            with torch.no_grad():
                self.center.mul_(0.9).add_(0.1)
        return y.squeeze(1)


def data(seed: int, batches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, generator=generator).double(), torch.randn(6, generator=generator).double())
        for _ in range(batches)
    ]


def program(
    optimizer: Callable[[Any], torch.optim.Optimizer], response: nestor.Response, shift: float = 0.0, **options: Any
) -> tuple[nestor.Program, nestor.Variable]:
    """Six losses are weighted by learned numbers; regularization is learned too."""
    torch.manual_seed(0)
    net = Net().double()
    weights = nestor.Variable(torch.linspace(-1, 1, 6).double())
    with torch.no_grad():
        weights.value[2] += shift

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        x, y = batch
        return (torch.sigmoid(weights()) * (net(x) - y) ** 2).mean() + 0.01 * weights()[2] * sum(
            p.square().sum() for p in net.parameters()
        )

    def valid(batch: Any, net: Any, weights: Any) -> Tensor:
        x, y = batch
        return ((net.body(x).squeeze(1) - y) ** 2).mean() + 0.01 * weights().square().sum()

    steps = optimizer(net.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(steps, 0.9)
    upper = torch.optim.SGD(weights.parameters(), lr=1.0)
    return (
        nestor.Program(
            net=nestor.Problem(
                net, train, optimizer=steps, scheduler=schedule, data=data(1, 7), response=response, **options
            ),
            weights=nestor.Problem(weights, valid, optimizer=upper, data=data(2, 1)),
        ),
        weights,
    )


def run(shift: float, *arguments: Any, **options: Any) -> tuple[float, Tensor]:
    """Run one cycle: the upper loss at its end, and the hypergradient (the step of SGD with lr 1)."""
    built, weights = program(*arguments, shift, **options)
    before = weights.value.detach().clone()
    metrics = nestor.Engine(built, seed=3).run(options["unroll_steps"])
    return metrics["weights/loss"], before - weights.value.detach()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, lr=0.02, eps=1e-2, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 0.3}], ids=["plain", "accumulate-clip"])
def test_engine_hypergradient_equals_rerun(name: str, options: dict[str, Any]) -> None:
    """Dropout, BatchNorm, moving buffers, a schedule, other batches every step: the derivative of the run."""
    arguments = OPTIMIZERS[name], nestor.Unrolled()
    _, hypergradient = run(0.0, *arguments, unroll_steps=5, **options)
    step = 1e-5
    plus, minus = (run(s * step, *arguments, unroll_steps=5, **options)[0] for s in (1, -1))
    expected = (plus - minus) / (2 * step)
    assert abs(hypergradient[2].item() - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop-momentum"])
def test_checkpoints_agree_bitwise(name: str, tmp_path: Path) -> None:
    """And so do graphs that are kept or not, and states kept elsewhere."""
    responses = [nestor.Unrolled(checkpoint=c) for c in CHECKPOINTS]
    responses += [nestor.Unrolled(checkpoint=c, keep_graphs=k) for c in ("sqrt", "tree") for k in (True, False)]
    responses += [nestor.Unrolled(offload_to=tmp_path / "states"), nestor.Unrolled(checkpoint="sqrt", offload_to="cpu")]
    results = [run(0.0, OPTIMIZERS[name], r, unroll_steps=13)[1] for r in responses]
    assert all(torch.equal(r, results[0]) for r in results)
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_truncation(checkpoint: str) -> None:
    """The last three of eleven steps: the earlier ones are constants."""
    full = nestor.Unrolled(steps=3, checkpoint=checkpoint)
    _, got = run(0.0, OPTIMIZERS["momentum"], full, unroll_steps=11)
    built, weights = program(OPTIMIZERS["momentum"], full, unroll_steps=11)
    engine = nestor.Engine(built, seed=3)
    state = engine.states["net"]
    seen = []

    class Look(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            if level == "net":
                seen.append(len(state.present_history().steps))

    engine.callbacks = (Look(),)
    before = weights.value.detach().clone()
    engine.run(11)
    assert torch.equal(before - weights.value.detach(), got)
    assert max(seen) <= 2 * 3
    whole = run(0.0, OPTIMIZERS["momentum"], nestor.Unrolled(), unroll_steps=11)[1]
    assert not torch.allclose(got, whole, rtol=1e-3)
    reference = run(0.0, OPTIMIZERS["momentum"], nestor.Unrolled(steps=3), unroll_steps=11)[1]
    assert torch.equal(got, reference)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forward_mode_gives_the_same_numbers(name: str) -> None:
    """Six upper variables, pushed along the run: dropout, BatchNorm, accumulation, clipping, a schedule."""
    options = {"unroll_steps": 4, "accumulate": 2, "clip_norm": 0.3}
    one = run(0.0, OPTIMIZERS[name], nestor.Unrolled(), **options)[1]
    two = run(0.0, OPTIMIZERS[name], nestor.ForwardUnrolled(), **options)[1]
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_forward_mode_through_an_init() -> None:
    """MAML with two variables."""
    results = []
    for response in (nestor.Unrolled(), nestor.ForwardUnrolled()):
        fast, meta = nestor.Variable(torch.zeros(2).double()), nestor.Variable(torch.tensor([0.3, -0.5]).double())
        built = nestor.Program(
            fast=nestor.Problem(
                fast,
                lambda fast, meta: torch.sin(fast() * meta().sum()).sum() + (fast() ** 4).sum(),
                optimizer=torch.optim.Adam(fast.parameters(), lr=0.1),
                unroll_steps=3,
                init="meta",
                response=response,
            ),
            meta=nestor.Problem(meta, lambda fast: (fast() ** 2).sum()),
        )
        results.append(built.hypergradient("meta")["value"])
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_forward_mode_refuses_many_variables() -> None:
    """And says what to take."""
    with pytest.raises(nestor.NestorError, match="checkpoint='tree'"):
        run(0.0, OPTIMIZERS["sgd"], nestor.ForwardUnrolled(max_inputs=5), unroll_steps=2)


def hand_unrolled(built: nestor.Program, batch: Any, valid: Any, steps: int) -> Tensor:
    """One graph through all steps, written out."""
    net, weights = (level.problem.module for level in built.levels.values())
    names = [n for n, _ in net.named_parameters()]
    params, state = [p.detach().clone().requires_grad_() for p in net.parameters()], None
    value = weights.value.detach().clone().requires_grad_()

    class Swap(nn.Module):
        def __init__(self, loss: Any) -> None:
            super().__init__()
            self.net, self.loss = net, loss

        def forward(self, batch: Any) -> Tensor:
            return self.loss(batch, net=self.net, weights=lambda: value)

    def evaluate(loss: Any, batch: Any) -> Tensor:
        tensors = {f"net.{n}": p for n, p in zip(names, params, strict=True)}
        tensors |= {f"net.{n}": b.clone() for n, b in net.named_buffers()}
        state = torch.random.get_rng_state()
        result = torch.func.functional_call(Swap(loss), tensors, (batch,))
        torch.random.set_rng_state(state)
        return result

    problems = [level.problem for level in built.levels.values()]
    for _ in range(steps):
        grads = torch.autograd.grad(evaluate(problems[0].loss, batch), params, create_graph=True)
        params, state = functional_step(problems[0].optimizer, params, grads, state)
    return torch.autograd.grad(evaluate(problems[1].loss, valid), value)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_without_an_engine_steps_lie_ahead(name: str, checkpoint: str) -> None:
    """``hypergradient`` is the derivative of ``objective``, which takes the steps; nothing changes."""
    built, weights = program(OPTIMIZERS[name], nestor.Unrolled(checkpoint=checkpoint), unroll_steps=4)
    batches = {"net": data(5, 1)[0], "weights": data(6, 1)[0]}
    before = [p.detach().clone() for p in built.levels["net"].parameters]
    got = built.hypergradient("weights", batches)["value"]
    expected = hand_unrolled(built, batches["net"], batches["weights"], 4)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weights.value[0] += sign * 1e-5
            values.append(built.objective("weights", batches).item())
            weights.value[0] -= sign * 1e-5
    assert abs((values[0] - values[1]) / 2e-5 - got[0].item()) <= 1e-6 * abs(got[0].item())
    assert all(torch.equal(p, q) for p, q in zip(before, built.levels["net"].parameters, strict=True))
    assert not built.levels["net"].problem.optimizer.state


def test_learned_learning_rate() -> None:
    """The rate of the optimizer is a variable of the level above: the optimizer itself names it."""

    def build(rate: float) -> tuple[nestor.Program, nestor.Variable]:
        torch.manual_seed(0)
        net, lr = nn.Linear(3, 1).double(), nestor.Variable(torch.tensor(rate, dtype=torch.float64))
        optimizer = torch.optim.Adam(net.parameters(), lr=lr.value)
        return nestor.Program(
            net=nestor.Problem(
                net,
                lambda batch, net: ((net(batch[0]).squeeze(1) - batch[1]) ** 2).mean(),
                optimizer=optimizer,
                data=data(1, 3),
                unroll_steps=6,
                response=nestor.Unrolled(checkpoint="tree"),
            ),
            lr=nestor.Problem(
                lr,
                lambda batch, net: ((net(batch[0]).squeeze(1) - batch[1]) ** 2).mean(),
                optimizer=torch.optim.SGD(lr.parameters(), lr=1.0),
                data=data(2, 1),
            ),
        ), lr

    built, lr = build(0.05)
    assert built.uppers("net") == ("lr",)
    nestor.Engine(built, seed=0).run(6)
    got = 0.05 - lr.value.item()
    ends = [nestor.Engine(build(0.05 + s * 1e-6)[0], seed=0).run(6)["lr/loss"] for s in (1, -1)]
    assert abs(got - (ends[0] - ends[1]) / 2e-6) <= 1e-6 * abs(got)


def test_update_rule_with_learned_rates() -> None:
    """Meta-SGD: a rate for every parameter, in an update rule that reads the level by name."""

    def rule(params: list[Tensor], grads: list[Tensor], state: Any, rates: Any) -> tuple[list[Tensor], Any]:
        state = state or {"w": torch.zeros_like(grads[0]), "b": torch.zeros_like(grads[1])}
        state = {"w": 0.5 * state["w"] + grads[0], "b": 0.5 * state["b"] + grads[1]}
        moved = [p - torch.exp(r) * state[k] for p, r, k in zip(params, (rates.weight, rates.bias), "wb", strict=True)]
        return moved, state

    def build(shift: float) -> tuple[nestor.Program, nn.Linear]:
        torch.manual_seed(0)
        net, rates = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
        with torch.no_grad():
            rates.weight.fill_(-3.0)
            rates.weight[0, 1] += shift

        return nestor.Program(
            net=nestor.Problem(
                net, loss_of_net, update=rule, data=data(1, 3), unroll_steps=5, response=nestor.Unrolled()
            ),
            rates=nestor.Problem(
                rates, loss_of_net, optimizer=torch.optim.SGD(rates.parameters(), 1.0), data=data(2, 1)
            ),
        ), rates

    def loss_of_net(batch: Any, net: Any) -> Tensor:
        return ((net(batch[0]).squeeze(1) - batch[1]) ** 2).mean()

    built, rates = build(0.0)
    before = rates.weight.detach().clone()
    nestor.Engine(built, seed=0).run(5)
    got = (before - rates.weight.detach())[0, 1].item()
    ends = [nestor.Engine(build(s * 1e-5)[0], seed=0).run(5)["rates/loss"] for s in (1, -1)]
    assert abs(got - (ends[0] - ends[1]) / 2e-5) <= 1e-6 * abs(got)


def middle(shift: float, checkpoint: str) -> tuple[float, float]:
    """Three levels, the lower two unrolled; the lowest starts from the top and reads both others."""
    a, b, c = (nestor.Variable(torch.tensor(v).double()) for v in ([0.3, -0.2], [0.5, 0.1], [0.4, 0.7]))
    with torch.no_grad():
        c.value[1] += shift

    def low(a: Any, b: Any, c: Any) -> Tensor:
        return ((a() - torch.tanh(b()) * c()) ** 2).sum() + 0.1 * (a() ** 4).sum()

    def mid(a: Any, b: Any, c: Any) -> Tensor:
        return ((b() - a() * c()) ** 2).sum() + (torch.sin(a()) * b()).sum()

    def top(b: Any, c: Any) -> Tensor:
        return (b() ** 2).sum() + 0.1 * (c() ** 3).sum()

    response = nestor.Unrolled(checkpoint=checkpoint)
    built = nestor.Program(
        a=nestor.Problem(
            a,
            low,
            optimizer=torch.optim.SGD(a.parameters(), 0.1, momentum=0.5),
            unroll_steps=3,
            response=response,
            init="c",
        ),
        b=nestor.Problem(b, mid, optimizer=torch.optim.Adam(b.parameters(), 0.1), unroll_steps=2, response=response),
        c=nestor.Problem(c, top, optimizer=torch.optim.SGD(c.parameters(), 1.0)),
    )
    before = c.value.detach().clone()
    loss = nestor.Engine(built, seed=0).run(6)["c/loss"]
    return loss, (before - c.value.detach())[1].item()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_two_unrolled_levels_replay_what_was(checkpoint: str) -> None:
    """Each step of the middle level contains the lower one's three steps as they were then, started from the top."""
    _, got = middle(0.0, checkpoint)
    ends = [middle(s * 1e-5, checkpoint)[0] for s in (1, -1)]
    expected = (ends[0] - ends[1]) / 2e-5
    assert abs(got - expected) <= 1e-6 * abs(expected)


def tree_of(total: int) -> tuple[Trajectory, Tensor]:
    """Gradient descent on a quartic, as a trajectory of which the first state is known."""
    theta = torch.tensor([0.7], dtype=torch.float64)
    optimizer = torch.optim.SGD([theta], lr=0.01)

    def term(t: Any, inputs: Any) -> Tensor:
        return (t[0] ** 4 + inputs[0] * t[0] ** 2 + torch.sin(t[0])).sum()

    record = StepRecord((), OptimizerUpdate.of(optimizer, [theta]))
    history = LevelHistory((), steps=[record] * total, states={0: lambda: State([theta], [{}])})
    lower = Objective("lower", (term,))
    return Trajectory(history, lambda _: lower), torch.tensor([0.3], dtype=torch.float64)


@pytest.mark.parametrize("total", [8, 64, 100, 513, 2000])
def test_tree_keeps_logarithmically_many_states(total: int) -> None:
    """T = 2,000 steps: at most 3 log2 T = 33 states, and the same derivative as one state a step."""
    trajectory, given = tree_of(total)
    one = torch.ones(1, dtype=torch.float64)
    tree = ReverseSweep(trajectory, [given], nestor.Unrolled(checkpoint="tree").pieces(total))
    got = tree.pull_back([one])
    assert tree.most <= 3 * math.log2(total)
    assert tree.held == 1
    every = ReverseSweep(trajectory, [given], nestor.Unrolled(checkpoint="step").pieces(total))
    assert torch.equal(got[0], every.pull_back([one])[0])
    assert every.most == total
    root = ReverseSweep(trajectory, [given], nestor.Unrolled(checkpoint="sqrt").pieces(total))
    assert torch.equal(got[0], root.pull_back([one])[0])
    assert root.most <= 2 * math.sqrt(total) + 2


class Saved:
    """The most memory that autograd's graphs held at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Tensor:
        held = tensor.detach()
        size = held.numel() * held.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self.release, size)
        return held

    def release(self, size: int) -> None:
        self.now -= size

    def unpack(self, held: Tensor) -> Tensor:
        return held


def graph_memory(checkpoint: str, total: int) -> int:
    trajectory, given = tree_of(total)
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        ReverseSweep(trajectory, [given], nestor.Unrolled(checkpoint=checkpoint).pieces(total)).pull_back([given])
    return saved.peak


def test_memory_of_one_graph() -> None:
    """The graphs of 40 steps are no larger than those of 4, but for "none"."""
    for checkpoint in ("step", "sqrt", "tree"):
        assert graph_memory(checkpoint, 40) == graph_memory(checkpoint, 4)
    assert graph_memory("none", 40) > 8 * graph_memory("none", 4)


def test_counts_of_an_engine_step() -> None:
    """A cycle of T steps: T gradients of the run, T of the replay, T Hessian products."""
    built, _ = program(OPTIMIZERS["sgd"], nestor.Unrolled(), unroll_steps=5)
    engine = nestor.Engine(built, seed=0)
    with count_evaluations(built) as count:
        engine.run(5)
    assert (count.forwards["net"], count.gradients["net"], count.hvps["net"]) == (10, 10, 5)
    row = {row.level: row for row in built.explain().rows}["weights"]
    assert (row.cost.forwards["net"], row.cost.hvps["net"]) == (5, 5)


@pytest.mark.parametrize(
    ("checkpoint", "keep_graphs", "replays"),
    [("sqrt", True, 13), ("sqrt", False, 13 + 9), ("tree", True, 13), ("tree", False, 13 + 6)],
)
def test_an_engine_stores_states_at_the_right_distance(checkpoint: str, keep_graphs: bool, replays: int) -> None:
    """The pieces of 13 steps begin at 0, 4, 8, 12, or at every second step in a tree; kept graphs save a replay."""
    response = nestor.Unrolled(checkpoint=checkpoint, keep_graphs=keep_graphs)
    built, _ = program(OPTIMIZERS["adam"], response, unroll_steps=13, warmup_steps=13)
    engine = nestor.Engine(built, seed=0)
    seen = []

    class Look(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            if level == "net":
                seen.append(sorted(engine.states["net"].present_history().states))

    engine.callbacks = (Look(),)
    engine.run(26)  # the first cycle is longer: 26 steps, of which 13 warm up
    length = {"sqrt": 5, "tree": 4}[checkpoint]
    assert seen[25] == list(range(0, 26, length))
    with count_evaluations(built) as count:
        engine.run(13)
    assert seen[-1] == list(range(0, 13, {"sqrt": 4, "tree": 2}[checkpoint]))
    assert (count.forwards["net"], count.hvps["net"]) == (13 + replays, 13)


def test_large_graphs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a step on a batch of six is larger than the few weights; 512 MiB of graphs are kept all the same."""
    forwards = []
    for small in (kept_graphs.SMALL, 0):
        monkeypatch.setattr(kept_graphs, "SMALL", small)
        built, _ = program(OPTIMIZERS["adam"], nestor.Unrolled(checkpoint="sqrt"), unroll_steps=13)
        engine = nestor.Engine(built, seed=0)
        with count_evaluations(built) as count:
            engine.run(13)
        forwards.append(count.forwards["net"])
    assert forwards == [13 + 13, 13 + 13 + 9]
    row = {row.level: row for row in built.explain().rows}["weights"]
    assert row.cost.forwards["net"] == 13 + 9  # as if none were kept


def test_a_loss_whose_graph_cannot_be_observed() -> None:
    """One that uses torch.func: its graphs are not kept, unless asked for."""
    results = []
    for keep_graphs in (None, True, False):
        theta, scale = nestor.Variable(torch.ones(3).double()), nestor.Variable(torch.ones(3).double())

        def loss(theta: Any, scale: Any) -> Tensor:
            slope = torch.func.grad(lambda x: (x**3).sum())(theta())
            return (scale() * slope).square().sum()

        response = nestor.Unrolled(checkpoint="sqrt", keep_graphs=keep_graphs)
        optimizer = torch.optim.Adam(theta.parameters(), lr=0.1)
        built = nestor.Program(
            theta=nestor.Problem(theta, loss, optimizer=optimizer, unroll_steps=9, response=response),
            scale=nestor.Problem(
                scale, lambda theta: theta().sum(), optimizer=torch.optim.SGD(scale.parameters(), lr=1.0)
            ),
        )
        nestor.Engine(built, seed=0).run(9)
        results.append(scale.value.detach())
    assert all(torch.equal(r, results[0]) for r in results)
    assert not torch.equal(results[0], torch.ones(3).double())


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "rmsprop", "rmsprop-momentum"])
@pytest.mark.parametrize("tasks", [None, 3])
def test_closed_forms_give_the_derivatives_of_graphs(
    name: str, tasks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a program, with tasks and without."""
    results = []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr("nestor.responses.unrolling.step.closed_form_of", lambda update: None)
        torch.manual_seed(0)
        fast, meta = (nestor.Variable(torch.randn(4).double()) for _ in range(2))
        built = nestor.Program(
            fast=nestor.Problem(
                fast,
                lambda batch, fast, meta: (fast() * batch).sin().square().sum() + (fast() - meta()).pow(2).sum(),
                data=[torch.randn(*([tasks] if tasks else []), 4).double() for _ in range(5)],
                optimizer=OPTIMIZERS[name](fast.parameters()),
                unroll_steps=5,
                init="meta",
                tasks=tasks,
                response=nestor.Unrolled(checkpoint="sqrt"),
            ),
            meta=nestor.Problem(
                meta,
                lambda batch, fast: (fast() * batch).cos().sum(),
                data=[torch.randn(*([tasks] if tasks else []), 4).double()],
                optimizer=torch.optim.SGD(meta.parameters(), lr=1.0),
            ),
        )
        nestor.Engine(built, seed=0).run(5)
        results.append(meta.value.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_best_response_unrolls_an_optimizer() -> None:
    """For people with their own loop."""
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def objective(theta: Tensor, weight: Tensor) -> Tensor:
        return (weight * (theta - 1) ** 2 + theta**4).sum()

    optimizer = torch.optim.SGD([start], lr=0.1, momentum=0.9)
    theta = nestor.best_response(objective, start, weight, nestor.Unrolled(steps=4), optimizer=optimizer)
    (got,) = torch.autograd.grad(theta.sin().sum(), weight)
    params, state = [start.clone().requires_grad_()], None
    for _ in range(4):
        grads = torch.autograd.grad(objective(params[0], weight), params, create_graph=True)
        params, state = functional_step(optimizer, params, grads, state)
    torch.testing.assert_close(theta, params[0].detach(), rtol=0, atol=0, check_stride=False)
    torch.testing.assert_close(got, torch.autograd.grad(params[0].sin().sum(), weight)[0], rtol=1e-12, atol=0)
    with pytest.raises(nestor.NestorError, match=r"optimizer=torch\.optim\.SGD"):
        nestor.best_response(objective, start, weight, nestor.Unrolled(steps=4))


def test_second_derivative() -> None:
    """The node can be differentiated again."""
    start = torch.tensor([1.0, -1.0], dtype=torch.float64)
    optimizer = torch.optim.Adam([start], lr=0.1)

    def value(weight: Tensor) -> Tensor:
        theta = nestor.best_response(
            lambda t, w: (w * (t - 1) ** 2 + t**4).sum(), start, weight, nestor.Unrolled(steps=3), optimizer=optimizer
        )
        return theta.sin().sum()

    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, weight)
    assert torch.autograd.gradgradcheck(value, weight)


def test_no_trace() -> None:
    """Parameters, buffers, optimizer, generators."""
    built, _ = program(OPTIMIZERS["adamw"], nestor.Unrolled(), unroll_steps=3)
    nestor.Engine(built, seed=0).run(4)
    level = built.levels["net"]
    optimizer = level.problem.optimizer
    held = [t.detach().clone() for t in (*level.parameters, *level.problem.module.buffers())]
    slots = [v.clone() for s in optimizer.state.values() for v in s.values()]
    again = lambda: [v for s in optimizer.state.values() for v in s.values()]  # noqa: E731
    generator = torch.get_rng_state()
    built.hypergradient("weights", {"net": data(5, 1)[0], "weights": data(6, 1)[0]})
    now = [*level.parameters, *level.problem.module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(slots, again(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in level.parameters)


def test_bad_arguments() -> None:
    """Said at construction."""
    with pytest.raises(ValueError, match="steps=0"):
        nestor.Unrolled(steps=0)
    with pytest.raises(ValueError, match="'none', 'step', 'sqrt', 'tree'"):
        nestor.Unrolled(checkpoint="all")
    with pytest.raises(ValueError, match=r"Level 'net'.*LBFGS has no differentiable step"):
        program(lambda p: torch.optim.LBFGS(p), nestor.Unrolled())
