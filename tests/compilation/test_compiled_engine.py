"""Compiled steps: the numbers of eager ones, and the eager path where they cannot be had."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import nestor

F64 = torch.float64


class Regression:
    """Ridge-like logistic regression whose weight decays are learned, in double precision."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 4, generator=generator, dtype=F64)
        y = (x.sum(1) + 0.5 * torch.randn(40, generator=generator, dtype=F64) > 0).to(F64)
        self.train, self.valid = (x[:20], y[:20]), (x[20:], y[20:])
        self.weights = nestor.Variable(torch.zeros(4, dtype=F64))
        self.decay = nestor.Variable(torch.full((4,), -1.0, dtype=F64))

    @staticmethod
    def fit(batch: Any, weights: nn.Module, decay: nn.Module) -> dict[str, Tensor]:
        x, y = batch
        loss = F.binary_cross_entropy_with_logits(x @ weights(), y) + 0.5 * (decay().exp() * weights() ** 2).sum()
        return {"loss": loss, "size": weights().square().sum()}

    @staticmethod
    def judge(batch: Any, weights: nn.Module) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(x @ weights(), y)

    def engine(
        self, response: nestor.Response, lower: Callable[..., Any], *, compile: bool, **options: Any
    ) -> nestor.Engine:
        optimizer = lower(self.weights.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        program = nestor.Program(
            weights=nestor.Problem(
                self.weights,
                self.fit,
                data=[self.train, self.valid],
                optimizer=optimizer,
                scheduler=schedule,
                response=response,
                clip_norm=5.0,
                **options,
            ),
            decay=nestor.Problem(
                self.decay, self.judge, data=[self.valid], optimizer=Adam(self.decay.parameters(), lr=0.01)
            ),
        )
        return nestor.Engine(program, seed=0, compile=compile)


def both(
    make: Callable[[bool], tuple[nestor.Engine, list[Tensor]]], steps: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Run eagerly and compiled; return the metrics of both and the largest relative difference of the variables."""
    eager, expected = make(False)
    compiled, found = make(True)
    before, after = eager.run(steps), compiled.run(steps)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
    return before, after, difference


BILEVEL: dict[str, tuple[nestor.Response, Callable[..., Any]]] = {
    "T1T2, momentum": (nestor.T1T2(), lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "FiniteDifference, AdamW": (nestor.FiniteDifference(rel_step=1e-4), lambda p: AdamW(p, lr=0.05, amsgrad=True)),
    "ConjugateGradient": (
        nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4, rtol=1e-6)),
        lambda p: SGD(p, lr=0.5),
    ),
    "Neumann, RMSprop": (nestor.Implicit(solver=nestor.Neumann(num_terms=4)), lambda p: RMSprop(p, lr=0.01)),
    "Unrolled, Adam": (nestor.Unrolled(), lambda p: Adam(p, lr=0.05)),
    "Unrolled sqrt, momentum": (nestor.Unrolled(checkpoint="sqrt"), lambda p: SGD(p, lr=0.1, momentum=0.9)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_stack")
@pytest.mark.parametrize("case", BILEVEL)
def test_bilevel_equals_eager(case: str) -> None:
    """Variables to 1e-12, metrics too: optimizers, clipping, schedules, several batches, unroll_steps."""
    response, optimizer = BILEVEL[case]

    def make(compile: bool) -> tuple[nestor.Engine, list[Tensor]]:
        problem = Regression()
        engine = problem.engine(response, optimizer, compile=compile, unroll_steps=3)
        return engine, [problem.weights(), problem.decay()]

    before, after, difference = both(make, 20)
    assert difference < 1e-12
    # The first loss of a difference has the noise of its step size.
    assert before.keys() == after.keys()
    for name in before:
        assert after[name] == pytest.approx(before[name], rel=1e-9, abs=1e-14), name


@pytest.mark.filterwarnings("ignore")
def test_exact_trilevel_equals_eager() -> None:
    """A middle level whose curvature contains the response below: second derivatives inside the graph."""

    def make(compile: bool) -> tuple[nestor.Engine, list[Tensor]]:
        variables = [nestor.Variable(torch.full((3,), 0.5, dtype=F64)) for _ in range(3)]
        low, mid, top = variables
        exact = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3, rtol=0.0))
        program = nestor.Program(
            low=nestor.Problem(
                low,
                lambda low, mid, top: ((low() - mid() * top()) ** 2).sum() + 0.1 * (low() ** 4).sum(),
                optimizer=SGD(low.parameters(), lr=0.1),
                response=exact,
            ),
            mid=nestor.Problem(
                mid,
                lambda mid, low, top: ((mid() - torch.tanh(top())) ** 2).sum() + ((low() - 1) ** 2).sum(),
                optimizer=SGD(mid.parameters(), lr=0.1),
                response=exact,
            ),
            top=nestor.Problem(
                top,
                lambda top, mid, low: (mid() * low()).sum() + (top() ** 2).sum(),
                optimizer=SGD(top.parameters(), lr=0.1),
            ),
        )
        return nestor.Engine(program, seed=0, compile=compile), [v() for v in variables]

    assert both(make, 8)[2] < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_tasks_equal_eager() -> None:
    """MAML: vmapped tasks that start from the level above."""

    def make(compile: bool) -> tuple[nestor.Engine, list[Tensor]]:
        torch.manual_seed(0)
        meta = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        fast = copy.deepcopy(meta)
        x = torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4, 1)
        data = [((x, torch.sin(3 * x)), (x + 0.1, torch.sin(3 * x + 0.3)))]
        episodes = nestor.Episodes(data, steps=2)

        def fit(batch: Any, fast: nn.Module) -> Tensor:
            return F.mse_loss(fast(batch[0]), batch[1])

        program = nestor.Program(
            fast=nestor.Problem(
                fast,
                fit,
                data=episodes.support,
                optimizer=SGD(fast.parameters(), lr=0.1),
                unroll_steps=2,
                init="meta",
                tasks=3,
                response=nestor.Unrolled(),
            ),
            meta=nestor.Problem(meta, fit, data=episodes.query, optimizer=Adam(meta.parameters(), lr=0.01)),
        )
        return nestor.Engine(program, seed=0, compile=compile), list(meta.parameters())

    assert both(make, 12)[2] < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_two_levels_above_an_unrolled_one() -> None:
    """Each sees the steps as a function of its own variables, of the same shapes."""

    def make(compile: bool) -> tuple[nestor.Engine, list[Tensor]]:
        low, one, two = (nestor.Variable(torch.full((3,), value, dtype=F64)) for value in (0.5, 0.2, 0.7))
        program = nestor.Program(
            low=nestor.Problem(
                low,
                lambda low, one, two: ((low() - one() * two().sin()) ** 2).sum() + 0.1 * (low() ** 4).sum(),
                optimizer=SGD(low.parameters(), lr=0.1, momentum=0.5),
                response=nestor.Unrolled(),
                unroll_steps=2,
            ),
            one=nestor.Problem(one, lambda low: (low() - 1).square().sum(), optimizer=SGD(one.parameters(), lr=0.1)),
            two=nestor.Problem(two, lambda low: (low() + 2).square().sum(), optimizer=SGD(two.parameters(), lr=0.1)),
        )
        return nestor.Engine(program, seed=0, compile=compile), [v() for v in (low, one, two)]

    assert both(make, 12)[2] < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_counts_and_graphs() -> None:
    """One graph for the two levels, whose evaluations are counted as if they were made eagerly."""
    problem = Regression()
    engine = problem.engine(nestor.T1T2(), lambda p: SGD(p, lr=0.1), compile=True)
    engine.run(3)
    with nestor.diagnostics.count_evaluations(engine.program) as compiled:
        engine.run(4)
    eager = Regression().engine(nestor.T1T2(), lambda p: SGD(p, lr=0.1), compile=False)
    with nestor.diagnostics.count_evaluations(eager.program) as plain:
        eager.run(4)
    assert (compiled.forwards, compiled.gradients) == (plain.forwards, plain.gradients)
    assert engine.eager_reasons == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_stack")
def test_numbers_that_are_not_finite_change_nothing() -> None:
    """The graph says so, and the same step without it says why."""
    weights, scale = nestor.Variable(torch.ones(2)), nestor.Variable(torch.zeros(2))
    data = [(torch.ones(2),)] * 5 + [(torch.full((2,), float("nan")),)]
    program = nestor.Program(
        weights=nestor.Problem(
            weights,
            lambda batch, weights, scale: ((weights() - batch[0] * scale().exp()) ** 2).sum(),
            data=data,
            optimizer=SGD(weights.parameters(), lr=0.1),
        ),
        scale=nestor.Problem(scale, lambda weights: (weights() ** 2).sum(), optimizer=SGD(scale.parameters(), lr=0.1)),
    )
    engine = nestor.Engine(program, seed=0, compile=True)
    engine.run(5)
    before = weights().detach().clone()
    with pytest.raises(nestor.NonFiniteError, match="weights"):
        engine.run(1)
    assert torch.equal(weights(), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_stack")
def test_tensors_that_a_loss_captures_may_change() -> None:
    """They are read at every step, not when the graph is written."""
    target = torch.zeros(())

    def make(compile: bool) -> nestor.Variable:
        target.zero_()
        weights, scale = nestor.Variable(torch.ones(2)), nestor.Variable(torch.zeros(2))
        program = nestor.Program(
            weights=nestor.Problem(
                weights,
                lambda weights, scale: ((weights() - target - scale()) ** 2).sum(),
                optimizer=SGD(weights.parameters(), lr=0.1),
            ),
            scale=nestor.Problem(
                scale, lambda weights: (weights() ** 2).sum(), optimizer=SGD(scale.parameters(), lr=0.1)
            ),
        )
        engine = nestor.Engine(program, seed=0, compile=compile)
        engine.run(4)
        target.fill_(3.0)
        engine.run(4)
        return weights

    torch.testing.assert_close(make(True)(), make(False)())


class _Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


REASONS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor], str]] = {
    "dropout": (
        lambda: _Net(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)),
        torch.ones(5, 3),
        torch.mean,
        "random",
    ),
    "convolution": (lambda: _Net(nn.Conv1d(1, 2, 2)), torch.randn(5, 1, 3), torch.mean, "convolutions are slower"),
    "numbers": (
        lambda: _Net(nn.Linear(3, 1)),
        torch.randn(5, 3),
        lambda out: out.mean() * max(out.detach().abs().max().item(), 1.0),
        "cannot be traced",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REASONS)
def test_a_clear_sentence_and_the_eager_path(case: str) -> None:
    """What cannot be a graph, or is slower as one, runs as it would without compile=True."""
    network, x, reduce, words = REASONS[case]

    def make(compile: bool) -> tuple[nestor.Engine, nn.Module]:
        torch.manual_seed(0)
        net, scale = network(), nestor.Variable(torch.zeros(1))
        program = nestor.Program(
            net=nestor.Problem(
                net,
                lambda net, scale: (
                    reduce(net(x)) ** 2 + scale().exp().sum() * sum(p.square().sum() for p in net.parameters())
                ),
                optimizer=SGD(net.parameters(), lr=0.01),
            ),
            scale=nestor.Problem(scale, lambda net: reduce(net(x)) ** 2, optimizer=SGD(scale.parameters(), lr=0.01)),
        )
        return nestor.Engine(program, seed=0, compile=compile), net

    eager, expected = make(False)
    eager.run(4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled, found = make(True)
        compiled.run(4)
    assert any(words in str(t.message) and "'net'" in str(t.message) for t in told)
    assert words in compiled.eager_reasons["net"]
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_options_that_exclude_each_other() -> None:
    """A look-ahead is not compiled."""
    v = nestor.Variable(torch.ones(1))
    program = nestor.Program(a=nestor.Problem(v, lambda a: a().sum() ** 2, optimizer=SGD(v.parameters(), lr=0.1)))
    with pytest.raises(ValueError, match="Choose one"):
        nestor.Engine(program, compile=True, rollback=True)


@pytest.mark.filterwarnings("ignore")
def test_goes_on_from_a_state_and_calls_back() -> None:
    """A state taken in the middle of a compiled run is that of an eager one; callbacks see every step."""
    seen: list[str] = []

    class Seen(nestor.callbacks.Callback):
        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            seen.append(level)

    response, optimizer = BILEVEL["T1T2, momentum"]
    straight, first, second = Regression(), Regression(), Regression()
    straight.engine(response, optimizer, compile=False).run(8)
    begun = first.engine(response, optimizer, compile=True)
    begun.run(4)
    resumed = second.engine(response, optimizer, compile=True)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    resumed.callbacks = (Seen(),)
    resumed.run(4)
    torch.testing.assert_close(second.weights(), straight.weights(), rtol=1e-12, atol=1e-13)
    assert seen == ["weights", "decay"] * 4
    assert resumed.eager_reasons == {}


@pytest.mark.filterwarnings("ignore")
def test_hyperparameters_in_a_list_step_eagerly() -> None:
    """They cannot be told apart by their hash; the level says so and goes on."""
    problem = Regression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = problem.engine(nestor.T1T2(), lambda p: Adam(p, lr=0.1), compile=True)
        optimizer = engine.program.levels["weights"].problem.optimizer
        assert optimizer is not None
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        engine.run(3)
    assert "is not hashable" in engine.eager_reasons["weights"]
