"""T1T2(reuse=True): the mixed derivative at the point of the last step, from the graph of that step."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.checkpoints.folder import pack, unpack
from nestor.diagnostics import count_evaluations

BATCHES = [torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)]


class Recurrent(nn.Module):
    """A GRU over the halves of a row of features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(len(x), 2, 4))[0][:, -1]


# Of these, no graph is kept.
SLOW: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "GRU": Recurrent,
}


def network(middle: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    layers = [SLOW[middle]()] if middle else []
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 3)).double()


@cache
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 4).double(), torch.randint(0, 3, (12,))


def fit(batch: Any, net: Any, weights: Any) -> Tensor:
    x, y = data()
    return (torch.sigmoid(weights()) * F.cross_entropy(net(x) * batch, y, reduction="none")).mean()


def judge(net: Any) -> Tensor:
    x, y = data()
    return F.cross_entropy(net(x.flip(1)), y)


def build(response: nestor.Response, net: nn.Module, lr: float = 0.1, **options: Any) -> nestor.Program:
    weights = nestor.Variable(torch.zeros(12).double())
    return nestor.Program(
        net=nestor.Problem(
            net, fit, data=BATCHES, optimizer=torch.optim.SGD(net.parameters(), lr, 0.9), response=response, **options
        ),
        weights=nestor.Problem(weights, judge, optimizer=torch.optim.SGD(weights.parameters(), 1.0)),
    )


def by_hand(net: nn.Module, steps: int, unroll: int, accumulate: int = 1, lr: float = 0.1) -> Tensor:
    """Plain torch: each upper step reads the gradient graph of the last lower step, after that step."""
    weights = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(net.parameters(), lr, 0.9)
    drawn = 0
    for step in range(1, steps + 1):
        loss = torch.zeros((), dtype=torch.float64)
        for _ in range(accumulate):
            loss = loss + fit(BATCHES[drawn % 2], net, lambda held=weights: held) / accumulate
            drawn += 1
        before = list(net.parameters())
        gradient = torch.autograd.grad(loss, before, create_graph=True)
        mixed = [torch.autograd.grad(g.flatten(), weights, torch.eye(g.numel()).double(), is_grads_batched=True,
                                     retain_graph=True)[0] for g in gradient]  # fmt: skip
        for parameter, g in zip(net.parameters(), gradient, strict=True):
            parameter.grad = g.detach()
        optimizer.step()
        if step % unroll == 0:
            cotangent = torch.autograd.grad(judge(net), list(net.parameters()))
            product = sum((c.flatten() @ m for c, m in zip(cotangent, mixed, strict=True)), torch.zeros(12).double())
            weights = (weights + product).detach().requires_grad_()
    return weights.detach()


@pytest.mark.parametrize("middle", ["", *SLOW])
@pytest.mark.parametrize("options", [{}, {"unroll_steps": 3}, {"accumulate": 2, "unroll_steps": 2}], ids=str)
def test_equals_plain_torch(options: dict[str, int], middle: str) -> None:
    """The derivative of the step's own gradient, with the cotangent at the variables after the step."""
    unroll = options.get("unroll_steps", 1)
    program = build(nestor.T1T2(reuse=True), network(middle), **options)
    nestor.Engine(program, seed=0).run(4 * unroll)
    expected = by_hand(network(middle), 4 * unroll, unroll, options.get("accumulate", 1))
    torch.testing.assert_close(program.levels["weights"].parameters[0].detach(), expected, rtol=1e-12, atol=1e-14)


def test_the_points_differ_and_meet_for_small_steps() -> None:
    """Without ``reuse`` the point is the one after the step; both agree as the learning rate goes to zero."""

    def moved(response: nestor.Response, lr: float) -> Tensor:
        program = build(response, network(), lr=lr)
        nestor.Engine(program, seed=0).run(1)
        return program.levels["weights"].parameters[0].detach()

    apart = [(moved(nestor.T1T2(reuse=True), lr) - moved(nestor.T1T2(), lr)).norm() for lr in (1e-2, 1e-3)]
    assert apart[0] > 1e-6
    assert 5 < apart[0] / apart[1] < 20


def test_no_evaluation_beyond_the_steps_own() -> None:
    """A run of five steps: five forwards of the lower loss, and one product for each upper step."""
    program = build(nestor.T1T2(reuse=True), network(), unroll_steps=2)
    engine = nestor.Engine(program, seed=0, check=False)
    with count_evaluations(program) as count:
        engine.run(6)
    assert (count.forwards["net"], count.gradients["net"], count.hvps["net"]) == (6, 6, 3)


@pytest.mark.parametrize("middle", SLOW)
def test_evaluations_where_no_graph_is_kept(middle: str) -> None:
    """One more forward and gradient for each upper step, at the point of the last step."""
    program = build(nestor.T1T2(reuse=True), network(middle), unroll_steps=2)
    engine = nestor.Engine(program, seed=0, check=False)
    with count_evaluations(program) as count:
        engine.run(6)
    assert (count.forwards["net"], count.gradients["net"], count.hvps["net"]) == (9, 9, 0)
    row = {row.level: row for row in program.explain().rows}["weights"]
    assert (row.cost.forwards["net"], row.cost.hvps["net"]) == (1, 0)


class Counting(nn.Module):
    """A layer that assigns its buffer, instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return x / self.steps


@pytest.mark.parametrize("response", [nestor.T1T2(reuse=True), nestor.Unrolled(checkpoint="none")])
def test_buffers_move_as_without_a_graph(response: nestor.Response) -> None:
    """BatchNorm's statistics, and buffers that a module assigns."""

    def net() -> nn.Sequential:
        return nn.Sequential(network("BatchNorm"), Counting())

    def states(response: nestor.Response) -> list[Tensor]:
        held = net()
        nestor.Engine(build(response, held, unroll_steps=2), seed=0).run(4)
        return list(held.buffers())

    expected = states(nestor.T1T2() if isinstance(response, nestor.Implicit) else nestor.Unrolled(checkpoint="step"))
    kept = build(response, net(), unroll_steps=2)
    engine = nestor.Engine(kept, seed=0)
    engine.run(4)
    found = states(response)
    # The variables differ with the point of the response: compare the counters, and those of the same response.
    for one, other in zip(found, expected, strict=True):
        if isinstance(response, nestor.Unrolled) or not one.dim():
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_buffers_take_the_same_point() -> None:
    """The derivative is that at the variables before the step, whatever the buffers are by then."""
    one, other = network("BatchNorm"), network("BatchNorm")
    program = build(nestor.T1T2(reuse=True), one)
    nestor.Engine(program, seed=0).run(1)
    before = network("BatchNorm")
    weights = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(
        fit(BATCHES[0], before, lambda: weights), list(before.parameters()), create_graph=True
    )
    optimizer = torch.optim.SGD(other.parameters(), 0.1, 0.9)
    fit(BATCHES[0], other, lambda: weights.detach()).backward()
    optimizer.step()
    cotangent = torch.autograd.grad(judge(other), list(other.parameters()))
    (mixed,) = torch.autograd.grad(gradient, weights, cotangent)
    torch.testing.assert_close(program.levels["weights"].parameters[0].detach(), mixed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_resumed_run_goes_on(cut: int) -> None:
    """Graphs are not saved: in the middle of an unroll nothing differs; after it the product is computed anew."""

    def engine() -> nestor.Engine:
        return nestor.Engine(build(nestor.T1T2(reuse=True), network(), unroll_steps=2), seed=0)

    whole, first, second = engine(), engine(), engine()
    whole.run(8)
    first.run(cut)
    second.load_state_dict(unpack(pack(first.state_dict())))
    second.run(8 - cut)
    for name, level in whole.program.levels.items():
        for a, b in zip(level.parameters, second.program.levels[name].parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_outside_of_an_engine_it_is_the_plain_response() -> None:
    program = build(nestor.T1T2(reuse=True), network())
    plain = build(nestor.T1T2(), network())
    batches = {"net": BATCHES[0]}
    got, expected = (p.hypergradient("weights", batches)["value"] for p in (program, plain))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_how_it_prints_and_what_is_refused() -> None:
    assert repr(nestor.T1T2(reuse=True)) == "T1T2(reuse=True)"
    with pytest.raises(ValueError, match="Give one"):
        nestor.T1T2(reuse=True, cross=nestor.ReverseMode())


def test_explain_knows_the_cost() -> None:
    row = {row.level: row for row in build(nestor.T1T2(reuse=True), network()).explain().rows}["weights"]
    assert row.cost.forwards.get("net", 0) == 0
    assert row.cost.hvps["net"] == 1
