"""Numbers that losses, data and callbacks draw from numpy and Python's ``random`` are seeded and replayed."""

# ruff: noqa: NPY002 (the global generator of numpy is what is tested)

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.checkpoints.folder import pack, unpack
from nestor.data.random_numbers import Watch

STEPS, RATE = 4, 0.3

DRAWS: dict[str, Callable[[], float]] = {
    "numpy": lambda: float(np.random.beta(0.5, 0.5)),
    "python": random.random,
    "normal": lambda: float(np.random.randn()),
    "now and then": lambda: float(np.random.rand()) if torch.rand(()) < 0.5 else 0.25,
}


def states() -> list[Any]:
    """The states of the global generators, in a form that can be compared."""
    _, words, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), words.tolist(), rest]


class Mixup:
    """Ridge regression on mixed rows, with weights that an upper level learns."""

    def __init__(self, draw: Callable[[], float]) -> None:
        torch.manual_seed(1)
        self.x, self.y, self.x_test, self.y_test = (torch.randn(6, n).double() for n in (5, 1, 5, 1))
        self.start = torch.randn(1, 5).double()
        self.draw = draw
        self.drawn: list[float] = []

    def drawing(self) -> float:
        self.drawn.append(self.draw())
        return self.drawn[-1]

    def lower(self, weight: Tensor, w: Tensor, mix: float) -> Tensor:
        x, y = (mix * rows + (1 - mix) * rows.flip(0) for rows in (self.x, self.y))
        return (torch.sigmoid(w) * (x @ weight.T - y).square().squeeze(1)).mean() + 0.05 * weight.square().sum()

    def upper(self, weight: Tensor) -> Tensor:
        return (self.x_test @ weight.T - self.y_test).square().mean()

    def program(self, response: nestor.Response, steps: int = STEPS) -> tuple[nestor.Program, nestor.Variable]:
        net, w = nn.Linear(5, 1, bias=False).double(), nestor.Variable(torch.zeros(6).double())
        net.weight.data.copy_(self.start)

        def low(net: nn.Linear, w: nestor.Variable) -> Tensor:
            return self.lower(net.weight, w(), self.drawing())

        def high(net: nn.Linear) -> Tensor:
            return self.upper(net.weight)

        sgd = torch.optim.SGD(net.parameters(), lr=RATE)
        program = nestor.Program(
            net=nestor.Problem(net, low, optimizer=sgd, unroll_steps=steps, response=response),
            w=nestor.Problem(w, high, optimizer=torch.optim.SGD(w.parameters(), lr=1.0)),
        )
        return program, w

    def hypergradient(self, response: nestor.Response, **options: Any) -> Tensor:
        """The hypergradient after four steps, which the upper step has subtracted."""
        program, w = self.program(response)
        nestor.Engine(program, seed=0, **options).run(STEPS)
        return -w().detach()

    def end(self, w: Tensor, mixes: list[float]) -> Tensor:
        """Gradient descent with a graph, by hand."""
        weight = self.start.clone().requires_grad_()
        for mix in mixes:
            (slope,) = torch.autograd.grad(self.lower(weight, w, mix), weight, create_graph=True)
            weight = weight - RATE * slope
        return weight

    def unrolled(self, mixes: list[float]) -> Tensor:
        w = torch.zeros(6).double().requires_grad_()
        return torch.autograd.grad(self.upper(self.end(w, mixes)), w)[0]

    def implicit(self, mixes: list[float], *, inverse: bool) -> Tensor:
        """The formula of implicit differentiation at the last step's numbers, with or without the inverse Hessian."""
        w = torch.zeros(6).double().requires_grad_()
        weight = self.end(w, mixes).detach().requires_grad_()
        (v,) = torch.autograd.grad(self.upper(weight), weight)
        loss = self.lower(weight, w, mixes[-1])
        if inverse:
            hessian: Any = torch.autograd.functional.hessian(lambda p: self.lower(p, w, mixes[-1]), weight)
            v = torch.linalg.solve(hessian.reshape(5, 5), v.reshape(5)).reshape(1, 5)
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        return -torch.autograd.grad(slope, w, v)[0]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("checkpoint", ["step", "none", "sqrt", "tree"])
def test_unrolled_replays_what_the_steps_drew(kind: str, checkpoint: str) -> None:
    """Against the same steps by hand, with the numbers of the four real steps."""
    mixup = Mixup(DRAWS[kind])
    got = mixup.hypergradient(nestor.Unrolled(checkpoint=checkpoint))
    torch.testing.assert_close(got, mixup.unrolled(mixup.drawn[:STEPS]), rtol=1e-10, atol=1e-12)
    assert len(set(mixup.drawn[:STEPS])) > 1


@pytest.mark.parametrize("kind", ["numpy", "python"])
def test_responses_use_the_numbers_of_the_last_step(kind: str) -> None:
    """Closed forms; both ends of a difference draw the same numbers."""
    solver = nestor.ConjugateGradient(max_steps=50, rtol=1e-13)
    cases: dict[str, tuple[nestor.Response, bool, float]] = {
        "T1T2": (nestor.T1T2(), False, 1e-10),
        "FD": (nestor.FiniteDifference(), False, 1e-6),
        "CG": (nestor.Implicit(solver=solver), True, 1e-8),
    }
    for name, (response, inverse, tolerance) in cases.items():
        mixup = Mixup(DRAWS[kind])
        got = mixup.hypergradient(response)
        expected = mixup.implicit(mixup.drawn[:STEPS], inverse=inverse)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:Engine.compile=True.")
def test_compiled_steps_do_not_freeze_the_numbers() -> None:
    mixup = Mixup(DRAWS["numpy"])
    program, _ = mixup.program(nestor.Unrolled())
    engine = nestor.Engine(program, seed=0, compile=True)
    engine.run(6 * STEPS)
    assert "numpy" in engine.eager_reasons["net"]
    eager, _ = mixup.program(nestor.Unrolled())
    nestor.Engine(eager, seed=0).run(6 * STEPS)
    for name, level in eager.levels.items():
        torch.testing.assert_close(list(program.levels[name].parameters), list(level.parameters), rtol=0, atol=0)


def test_by_hand_leaves_no_trace() -> None:
    """``Program.hypergradient`` replays the same numbers too, from the user's states, and restores these."""
    mixup = Mixup(lambda: float(np.random.randn()) + random.random())
    for response in (nestor.Unrolled(), nestor.SAMA(), nestor.FiniteDifference()):
        program, _ = mixup.program(response)
        np.random.seed(3)
        np.random.randn()  # numpy keeps the second normal number of a pair in its state
        random.seed(3)
        before = states()
        mixup.drawn.clear()
        first = program.hypergradient("w", {})
        assert len(set(mixup.drawn)) == 1
        torch.testing.assert_close(program.hypergradient("w", {}), first, rtol=0, atol=0)
        assert states() == before
    np.random.seed(4)
    mixup.drawn.clear()
    program, _ = mixup.program(nestor.Unrolled())
    (got,) = program.hypergradient("w", {}).values()
    torch.testing.assert_close(got, mixup.unrolled(mixup.drawn[:1] * STEPS), rtol=1e-10, atol=1e-12)


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Rows that are augmented with the generators of numpy and Python when they are read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(np.random.rand()), random.random(), float(index)], dtype=torch.float64)


class Jitter(nestor.callbacks.Callback):
    """Moves a variable at random after each engine step."""

    def __init__(self, variable: nestor.Variable) -> None:
        self.variable = variable

    def on_step(self, engine: Any) -> None:
        with torch.no_grad():
            self.variable().add_(1e-2 * random.random() + 1e-2 * np.random.randn())


def augmented(kind: str, *, workers: int = 0, seed: int = 0) -> tuple[nestor.Engine, nestor.Variable]:
    torch.manual_seed(0)
    net, w = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(1).double())
    loader = torch.utils.data.DataLoader(Noisy(), 4, shuffle=True, num_workers=workers)
    fixed = [torch.ones(4, 3).double()]

    def low(batch: Tensor, net: nn.Linear, w: nestor.Variable) -> Tensor:
        noise = np.random.rand() + random.random() if kind == "loss" else 0.0
        return w().exp().sum() * (net(0.1 * batch) - 1 + noise).square().mean()

    def high(net: nn.Linear) -> Tensor:
        return net.weight.sum()

    program = nestor.Program(
        net=nestor.Problem(
            net,
            low,
            data=loader if kind == "data" else fixed,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            unroll_steps=3,
            response=nestor.Unrolled(),
        ),
        w=nestor.Problem(w, high, optimizer=torch.optim.SGD(w.parameters(), lr=1.0)),
    )
    # The jitter changes an upper variable between two lower steps, which the check of replays refuses.
    jitter = [Jitter(w)] if kind == "callbacks" else []
    return nestor.Engine(program, seed=seed, callbacks=jitter, check=not jitter), w


KINDS = ["loss", "data", "callbacks"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_determines_the_run(kind: str) -> None:
    """Whatever the states of the global generators are before; those come back."""
    ends = []
    for seed, own in [(0, 1), (0, 2), (5, 1)]:
        np.random.seed(own)
        random.seed(own)
        before = states()[1:]
        engine, w = augmented(kind, seed=seed)
        engine.run(30)
        assert states()[1:] == before
        ends.append(w().detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_loader_workers_are_seeded() -> None:
    """Torch derives the seeds of its workers, numpy's included, from the generator that the engine seeds."""
    ends = []
    for own in (1, 2):
        np.random.seed(own)
        engine, w = augmented("data", workers=1)
        engine.run(6)
        ends.append(w().detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [4, 22])
@pytest.mark.filterwarnings("ignore:Level 'net'. its data has no state_dict")
def test_a_resumed_run_draws_the_same_numbers(kind: str, cut: int) -> None:
    """Cut within an unroll and within an epoch, before and after the generators of a level are no longer watched."""
    whole, expected = augmented(kind)
    whole.run(40)
    first, _ = augmented(kind)
    first.run(cut)
    random.seed(99)
    np.random.seed(99)
    second, got = augmented(kind, seed=7)
    second.load_state_dict(unpack(pack(first.state_dict())))
    second.run(40 - cut)
    assert torch.equal(got(), expected())


def test_a_run_in_parts_draws_the_same_numbers() -> None:
    whole, expected = augmented("callbacks")
    whole.run(40)
    parts, got = augmented("callbacks")
    for steps in (1, 20, 19):
        parts.run(steps)
    assert torch.equal(got(), expected())


def test_validation_is_seeded() -> None:
    """With other numbers at every step, whatever the run has drawn before."""
    found: list[list[float]] = []
    for kind in ("loss", "data"):
        values: list[float] = []

        def validate(net: nn.Module, values: list[float] = values) -> float:
            values.append(float(np.random.rand()) + random.random())
            return values[-1]

        engine, _ = augmented(kind)
        nestor.Engine(engine.program, seed=0, validate=validate, validate_every=2).run(6)
        found.append(values)
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def watches(program: nestor.Program) -> Iterator[Watch]:
    for level in program.levels.values():
        yield level.loss.reader.watch


def test_a_loss_without_such_numbers_pays_nothing() -> None:
    """After its first 16 evaluations, one in 64 is watched; all others seed torch's generator alone."""
    mixup = Mixup(lambda: 0.3)
    program, _ = mixup.program(nestor.T1T2())
    engine = nestor.Engine(program, seed=0)
    engine.run(40)
    assert not any(watch.used for watch in watches(program))
    assert all(watch.evaluations > 0 for watch in watches(program))
    watch = Watch()
    assert sum(watch.is_due() for _ in range(16 + 640)) == 16 + 10


def test_late_numbers_are_noticed() -> None:
    """A loss that begins to draw after some hundred steps: refused, or right from some steps later on."""
    calls = 0

    def draw() -> float:
        nonlocal calls
        calls += 1
        return float(np.random.rand()) if calls > 300 else 0.5

    mixup = Mixup(draw)
    program, w = mixup.program(nestor.Unrolled())
    with pytest.raises(nestor.ReplayError, match="level 'net'"):
        nestor.Engine(program, seed=0).run(100 * STEPS)
    calls = 0
    mixup.drawn.clear()
    program, w = mixup.program(nestor.Unrolled())
    engine = nestor.Engine(program, seed=0, check=False)
    engine.run(100 * STEPS)
    assert program.levels["net"].loss.reader.watch.used
    mixup.start = program.levels["net"].parameters[0].detach().clone()
    before = w().detach().clone()
    mixup.drawn.clear()
    engine.run(STEPS)
    variable = before.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mixup.upper(mixup.end(variable, mixup.drawn[:STEPS])), variable)
    torch.testing.assert_close(before - w().detach(), expected, rtol=1e-9, atol=1e-12)
