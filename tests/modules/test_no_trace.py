"""A hypergradient leaves no trace, and an upper level that does not move does not disturb its lower level."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nestor

Untouched = Callable[[nestor.Program], AbstractContextManager[None]]
Bits = Callable[[Any], Any]

RESPONSES = {
    "T1T2": nestor.T1T2(),
    "FiniteDifference": nestor.FiniteDifference(),
    "CG": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4), damping=20.0),
    "CG-FiniteDifference": nestor.Implicit(
        solver=nestor.ConjugateGradient(max_steps=4), damping=20.0, cross=nestor.CentralDifference()
    ),
    "Neumann": nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.02), damping=20.0),
    "Dense": nestor.Implicit(solver=nestor.DenseSolve(), damping=20.0),
    "FirstOrder": nestor.FirstOrder(),
}
BATCHES = ("bottom", "middle", "top")


class Noisy(nn.Sequential):
    """A network with everything that a forward pass may move: BatchNorm statistics and the generator."""

    def __init__(self, inputs: int = 3, outputs: int = 3) -> None:
        super().__init__(
            nn.Linear(inputs, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, outputs), nn.Dropout(0.1)
        )
        self.double()


def bottom_loss(batch: tuple[Tensor, Tensor], bottom: nn.Module, middle: nn.Module) -> Tensor:
    x, y = batch
    losses = F.cross_entropy(bottom(x), y, reduction="none")
    return (torch.sigmoid(middle(losses[:, None])).squeeze(1) * losses).mean()


def middle_loss(batch: tuple[Tensor, Tensor], bottom: nn.Module, middle: nn.Module, top: nestor.Variable) -> Tensor:
    x, y = batch
    return F.cross_entropy(bottom(x), y) + sum((top()[0].exp() * p**2).sum() for p in middle.parameters())


def top_loss(
    batch: tuple[Tensor, Tensor], bottom: nn.Module, middle: nn.Module, top: nestor.Variable
) -> dict[str, Tensor]:
    x, y = batch
    loss = F.cross_entropy(bottom(x), y) + 0.1 * middle(x[:, :1]).square().mean() + 0.1 * top().square().sum()
    return {"loss": loss, "size": top().norm()}


def used_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose state is filled, for parameters whose ``.grad`` is."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def program_of(levels: int, response: nestor.Response, nesting: str = "exact") -> nestor.Program:
    """A program of two or three levels with noisy networks in it; some of their modules in eval mode."""
    bottom, middle, top = Noisy(), Noisy(1, 1), nestor.Variable(torch.randn(2, dtype=torch.float64))
    middle[3].eval()
    bottom[4].bias.requires_grad_(False)  # type: ignore[union-attr]
    problems = {
        "bottom": nestor.Problem(bottom, bottom_loss, optimizer=used_optimizer(bottom), response=response),
        "middle": nestor.Problem(middle, middle_loss, optimizer=used_optimizer(middle), response=response),
        "top": nestor.Problem(top, top_loss, optimizer=used_optimizer(top)),
    }
    if levels == 2:

        def upper_loss(batch: tuple[Tensor, Tensor], bottom: nn.Module, middle: nn.Module) -> Tensor:
            return middle_loss(batch, bottom, middle, top)

        problems["middle"] = nestor.Problem(middle, upper_loss, optimizer=problems["middle"].optimizer)
        del problems["top"]
    return nestor.Program(nesting=nesting, **problems)


def batches_of(program: nestor.Program) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 3, (6,))) for name in program.levels}


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("name", RESPONSES)
def test_hypergradient_leaves_no_trace(name: str, levels: int, nesting: str, untouched: Untouched) -> None:
    """Parameters, buffers, generator, ``.grad``, optimizer state and modes: bitwise, and without a write."""
    program = program_of(levels, RESPONSES[name], nesting)
    batches = batches_of(program)
    for level in program.levels:
        with untouched(program):
            gradient = program.hypergradient(level, batches)
            assert any(g.norm() > 0 for g in gradient.values())


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("name", RESPONSES)
def test_objective_leaves_no_trace(name: str, levels: int, nesting: str, untouched: Untouched) -> None:
    """Neither its evaluation nor a derivative through its graph, even after the generator has moved on."""
    program = program_of(levels, RESPONSES[name], nesting)
    batches, top = batches_of(program), list(program.levels)[-1]
    variables = program.levels[top].parameters
    with untouched(program):
        objective = program.objective(top, batches)
    wanted = list(program.hypergradient(top, batches).values())
    torch.rand(7)
    with untouched(program):
        got = torch.autograd.grad(objective, variables)
    # The objective runs the math kernels that the hypergradient runs, on the same random numbers.
    torch.testing.assert_close(list(got), wanted, rtol=1e-12, atol=1e-14)


def test_forward_mode_leaves_no_trace(untouched: Untouched) -> None:
    """Dual numbers stand in for the parameters; none is left behind."""
    program = program_of(2, nestor.T1T2(cross=nestor.ForwardMode()))
    batches = batches_of(program)
    with untouched(program):
        program.hypergradient("middle", batches)
    for p in program.levels["bottom"].problem.module.parameters():
        assert type(p) is nn.Parameter


def test_second_derivative_of_the_objective_leaves_no_trace(untouched: Untouched) -> None:
    """A response that is differentiated again evaluates its level more often, and still in silence."""
    program = program_of(2, nestor.Implicit(solver=nestor.DenseSolve(), damping=20.0))
    batches, variables = batches_of(program), program.levels["middle"].parameters
    with untouched(program):
        gradient = torch.autograd.grad(program.objective("middle", batches), variables, create_graph=True)
        torch.autograd.grad(sum((g**2).sum() for g in gradient), variables)


def test_a_failed_hypergradient_leaves_no_trace(untouched: Untouched) -> None:
    """Negative curvature stops the solve halfway."""
    solver = nestor.ConjugateGradient(max_steps=50, rtol=0)
    program = program_of(2, nestor.Implicit(solver=solver, damping=0.0, strict=True))
    batches = batches_of(program)
    with untouched(program), pytest.raises(nestor.SolverError, match="curvature"):
        program.hypergradient("middle", batches)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_no_trace_on_recurrent_weights(layer: type[nn.RNNBase], untouched: Untouched) -> None:
    """Recurrent layers keep a second list of their weights; calls must see the parameters again afterwards."""
    net = layer(2, 3, batch_first=True).double()
    weights = nestor.Variable(torch.zeros(4, dtype=torch.float64))

    def train(x: Tensor, net: nn.RNNBase, weights: nestor.Variable) -> Tensor:
        return (weights().exp() * net(x)[0].square().mean((1, 2))).mean()

    def valid(x: Tensor, net: nn.RNNBase) -> Tensor:
        return (net(x)[0] - 1).square().mean()

    response = nestor.FiniteDifference(rel_step=1.0)
    program = nestor.Program(net=nestor.Problem(net, train, response=response), weights=nestor.Problem(weights, valid))
    x = torch.randn(4, 5, 2, dtype=torch.float64)
    before = net(x)[0]
    with untouched(program):
        program.hypergradient("weights", {"net": x, "weights": x})
    after = net(x)[0]
    assert torch.equal(before, after)
    for a, b in zip(*(torch.autograd.grad(out.sum(), list(net.parameters())) for out in (before, after)), strict=True):
        assert torch.equal(a, b)


class Recorded(Dataset[tuple[Tensor, Tensor, int]]):
    """Samples that note in which order they are asked for; some augmentation draws random numbers."""

    def __init__(self, size: int = 12) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, 3, dtype=torch.float64, generator=generator)
        self.y = torch.randint(0, 3, (size,), generator=generator)
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        self.order.append(index)
        return self.x[index] + 0.01 * torch.randn(3, dtype=torch.float64), self.y[index], index


Sample = tuple[Tensor, Tensor, Tensor]
CONSTANT = torch.linspace(-1, 1, 12, dtype=torch.float64)


def weighted(batch: Sample, net: nn.Module, weights: nestor.Variable) -> Tensor:
    x, y, index = batch
    return (torch.sigmoid(weights()[index]) * F.cross_entropy(net(x), y, reduction="none")).mean()


def weighted_by_constants(batch: Sample, net: nn.Module) -> Tensor:
    x, y, index = batch
    return (torch.sigmoid(CONSTANT[index]) * F.cross_entropy(net(x), y, reduction="none")).mean()


def clean(batch: Sample, net: nn.Module) -> Tensor:
    # torch.rand: the upper level draws other amounts of random numbers than the lower one.
    return F.cross_entropy(net(batch[0]), batch[1]) * (1 + 0.01 * torch.rand(3).double().mean())


def lower_problem(loss: Callable[..., Tensor], **options: Any) -> tuple[nestor.Problem, nn.Module, Recorded]:
    torch.manual_seed(3)
    net, data = Noisy(), Recorded()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    loader = DataLoader(data, batch_size=5, shuffle=True)
    return nestor.Problem(net, loss, optimizer=optimizer, data=loader, **options), net, data


def run_alone(steps: int, **options: Any) -> tuple[nn.Module, Recorded]:
    problem, net, data = lower_problem(weighted_by_constants, **options)
    nestor.Engine(nestor.Program(net=problem), seed=5).run(steps)
    return net, data


def run_both(steps: int, lr: float, **options: Any) -> tuple[nn.Module, Recorded]:
    problem, net, data = lower_problem(weighted, **options)
    weights = nestor.Variable(CONSTANT)
    upper = nestor.Problem(
        weights,
        clean,
        optimizer=torch.optim.SGD(weights.parameters(), lr=lr),
        data=DataLoader(Recorded(8), batch_size=2, shuffle=True),
    )
    torch.manual_seed(99)
    nestor.Engine(nestor.Program(net=problem, weights=upper), seed=5).run(steps)
    return net, data


@pytest.mark.parametrize("name", [name for name in RESPONSES if name != "FirstOrder"])
def test_upper_level_without_learning_rate_changes_nothing(name: str, bits: Bits) -> None:
    """Lower trajectory, statistics and data order are bitwise those of the lower level alone."""
    alone, order = run_alone(7)
    net, seen = run_both(7, 0.0, response=RESPONSES[name])
    assert seen.order == order.order
    assert bits(net.state_dict()) == bits(alone.state_dict())


@pytest.mark.parametrize("options", [{"unroll_steps": 3}, {"accumulate": 2}, {"warmup_steps": 2}, {"clip_norm": 0.1}])
def test_upper_level_without_learning_rate_under_other_schedules(options: dict[str, Any], bits: Bits) -> None:
    """The same with several lower steps, micro-batches, a warm-up, and clipping."""
    alone, order = run_alone(6, **options)
    net, seen = run_both(6, 0.0, **options)
    assert seen.order == order.order
    assert bits(net.state_dict()) == bits(alone.state_dict())


def test_data_order_does_not_depend_on_the_upper_level(bits: Bits) -> None:
    """An upper level that moves changes the lower trajectory, and never the data it sees."""
    alone, order = run_alone(7)
    net, seen = run_both(7, 5.0)
    assert seen.order == order.order
    assert bits(net.state_dict()) != bits(alone.state_dict())


def test_a_run_leaves_the_generator_alone(bits: Bits) -> None:
    """And does not depend on its state, given a seed."""
    first, _ = run_both(3, 0.1)
    problem, _, _ = lower_problem(weighted_by_constants)
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    nestor.Engine(nestor.Program(net=problem), seed=5).run(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert bits(first.state_dict()) == bits(run_both(3, 0.1)[0].state_dict())


@pytest.mark.parametrize("unroll_steps", [1, 2])
@pytest.mark.parametrize("name", [name for name in RESPONSES if name != "FirstOrder"])
def test_batch_norm_moves_once_a_lower_step(name: str, unroll_steps: int) -> None:
    """Neither the upper loss, which reads the net in train mode, nor the response counts as a batch."""
    net, _ = run_both(6, 0.1, response=RESPONSES[name], unroll_steps=unroll_steps)
    assert int(net[1].num_batches_tracked) == 6  # type: ignore[index]


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
def test_batch_norm_of_three_levels(nesting: str) -> None:
    """The top loss reads both nets and the middle one the bottom net, all in train mode; no statistics move for it."""
    program = program_of(3, nestor.T1T2(), nesting)
    data = batches_of(program)
    counts: list[tuple[int, int]] = []
    bottom, middle = (program.levels[name].problem.module for name in ("bottom", "middle"))

    class Counting(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            counts.append(tuple(int(net[1].num_batches_tracked) for net in (bottom, middle)))  # type: ignore[arg-type, index]

    problems = {
        name: nestor.Problem(
            level.problem.module, level.problem.loss, optimizer=level.problem.optimizer, data=[data[name]]
        )
        for name, level in program.levels.items()
    }
    nestor.Engine(nestor.Program(nesting=nesting, **problems), callbacks=[Counting()], seed=0).run(2)
    # The bottom loss calls both nets in a plain forward pass; the middle and the top step move nothing below.
    assert counts == [(1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (2, 2)]


@pytest.mark.parametrize("argument", ["weights", "architecture"])
def test_batch_norm_of_a_shared_net_moves_once_a_lower_step(argument: str) -> None:
    """A supernet's statistics do not depend on the name under which the upper loss reads it."""
    net = Noisy()
    split = [*net[4].parameters()]
    rest = [p for p in net.parameters() if not any(p is q for q in split)]

    def train(batch: tuple[Tensor, Tensor], weights: nn.Module) -> Tensor:
        return F.cross_entropy(weights(batch[0]), batch[1])

    def valid_weights(batch: tuple[Tensor, Tensor], weights: nn.Module) -> Tensor:
        return F.cross_entropy(weights(batch[0]), batch[1])

    def valid_architecture(batch: tuple[Tensor, Tensor], architecture: nn.Module) -> Tensor:
        return F.cross_entropy(architecture(batch[0]), batch[1])

    data = [(torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 3, (6,)))]
    program = nestor.Program(
        weights=nestor.Problem(net, train, variables=rest, optimizer=torch.optim.SGD(rest, lr=0.1), data=data),
        architecture=nestor.Problem(
            net,
            valid_weights if argument == "weights" else valid_architecture,
            variables=split,
            optimizer=torch.optim.SGD(split, lr=0.1),
            data=data,
        ),
    )
    nestor.Engine(program, seed=0).run(4)
    assert int(net[1].num_batches_tracked) == 4  # type: ignore[arg-type]
