"""Runs of peers against loops in plain torch: both peers differentiate the same lower steps, before either moves."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import nestor

F64 = torch.float64
RATE, HEAVY, UPPER = 0.1, 0.8, 0.05


def low_loss(batch: Tensor, low: Any, a: Any, b: Any) -> Tensor:
    """Smooth, not quadratic, coupled in both peers."""
    return ((low() - batch * a() * b()) ** 2).sum() + 0.1 * (low() ** 4).sum() + (low() * a().sin()).sum()


def a_loss(batch: Tensor, low: Any, a: Any) -> Tensor:
    return ((low() - batch) ** 2).sum() + (a() - 1).square().sum()


def b_loss(batch: Tensor, low: Any, b: Any) -> Tensor:
    return ((low() - 2 * batch) ** 2).sum() + 0.3 * (b() - 2).square().sum()


def rows(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(1 + 0.3 * torch.randn(7, generator=generator, dtype=F64))


def peers(response: nestor.Response, unroll: int = 1, *, nesting: str = "exact", slow: int = 0) -> nestor.Program:
    """Two uppers of one lower; with ``slow``, a has a lower of its own that takes as many steps."""
    low, a, b = (nestor.Variable(torch.tensor(v, dtype=F64)) for v in ([0.1, 0.4], [0.8, 1.1], [1.2, 0.7]))
    shared = nestor.Problem(
        low,
        low_loss,
        data=rows(1),
        optimizer=SGD(low.parameters(), lr=RATE, momentum=HEAVY),
        unroll_steps=unroll,
        response=response,
    )
    problems = {"low": shared}
    uppers = {
        "a": nestor.Problem(a, a_loss, data=rows(2), optimizer=SGD(a.parameters(), lr=UPPER)),
        "b": nestor.Problem(b, b_loss, data=rows(3), optimizer=SGD(b.parameters(), lr=UPPER)),
    }
    if slow:
        own = nestor.Variable(torch.tensor(0.2, dtype=F64))

        def own_loss(own: Any, a: Any) -> Tensor:
            return (own() - 1).square() + 0.0 * a().sum()

        def a_loss_too(batch: Tensor, low: Any, a: Any, own: Any) -> Tensor:
            return a_loss(batch, low, a)

        optimizer = SGD(own.parameters(), lr=0.1)
        problems["own"] = nestor.Problem(own, own_loss, optimizer=optimizer, unroll_steps=slow)
        uppers["a"] = nestor.Problem(a, a_loss_too, data=rows(2), optimizer=SGD(a.parameters(), lr=UPPER))
    return nestor.Program(nesting=nesting, **problems, **uppers)


class Hand:
    """The same run in plain torch. A peer's hypergradient is taken at the values of all levels at the lower's steps."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.low, self.a, self.b = (torch.tensor(v, dtype=F64) for v in ([0.1, 0.4], [0.8, 1.1], [1.2, 0.7]))
        self.velocity: Tensor | None = None
        self.rows = {"low": rows(1), "a": rows(2), "b": rows(3)}
        self.drawn = {"low": 0, "a": 0, "b": 0}
        self.steps: list[tuple[Tensor, Tensor | None, Tensor]] = []  # batch, velocity, variables before each step
        self.then = (self.a, self.b)

    def draw(self, name: str) -> Tensor:
        self.drawn[name] += 1
        return self.rows[name][(self.drawn[name] - 1) % 7]

    def gradient(self, batch: Tensor, low: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.autograd.grad(low_loss(batch, lambda: low, lambda: a, lambda: b), low, create_graph=True)[0]

    def move(self, batch: Tensor, velocity: Tensor | None, low: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self.gradient(batch, low, a, b)
        velocity = gradient if velocity is None else HEAVY * velocity + gradient
        return low - RATE * velocity, velocity

    def step_low(self, *, restarts: bool) -> None:
        if restarts:
            self.steps, self.then = [], (self.a, self.b)
        batch = self.draw("low")
        self.steps.append((batch, self.velocity, self.low))
        low, velocity = self.move(batch, self.velocity, self.low.clone().requires_grad_(), self.a, self.b)
        self.low, self.velocity = low.detach(), velocity.detach()

    def upper(self, name: str) -> Tensor:
        """The hypergradient of a peer."""
        batch, loss = self.draw(name), {"a": a_loss, "b": b_loss}[name]
        own = getattr(self, name).clone().requires_grad_()
        low = self.low.clone().requires_grad_()
        direct, cotangent = torch.autograd.grad(loss(batch, lambda: low, lambda: own), [own, low])
        a, b = (own, self.then[1]) if name == "a" else (self.then[0], own)
        if self.kind == "unrolled":
            _, velocity, point = self.steps[0]
            point = point.clone().requires_grad_()
            for draw, _, _ in self.steps:
                point, velocity = self.move(draw, velocity, point, a, b)
            assert torch.equal(point.detach(), self.low) or (point - self.low).abs().max() < 1e-14
            return direct + torch.autograd.grad(point, own, cotangent)[0]
        gradient = self.gradient(self.steps[-1][0], low, a, b)
        if self.kind == "solved":
            hessian = torch.stack([torch.autograd.grad(g, low, retain_graph=True)[0] for g in gradient])
            cotangent = torch.linalg.solve(hessian, cotangent)
        scale = RATE if self.kind == "sama" else 1.0  # momentum SGD: dStep/dg = -lr
        return direct - scale * torch.autograd.grad(gradient, own, cotangent)[0]

    def end(self, names: Sequence[str]) -> None:
        """All hypergradients first, then all steps."""
        found = {name: self.upper(name) for name in names}
        for name, gradient in found.items():
            setattr(self, name, getattr(self, name) - UPPER * gradient)


RESPONSES: list[tuple[nestor.Response, str]] = [
    (nestor.T1T2(), "mixed"),
    (nestor.T1T2(cross=nestor.ReverseMode()), "mixed"),
    (nestor.Implicit(solver=nestor.DenseSolve()), "solved"),
    (nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=20, rtol=1e-14)), "solved"),
    (nestor.SAMA(), "sama"),
    (nestor.Unrolled(), "unrolled"),
    (nestor.Unrolled(checkpoint="none"), "unrolled"),
    (nestor.Unrolled(checkpoint="sqrt"), "unrolled"),
    (nestor.ForwardUnrolled(), "unrolled"),
]


def values(program: nestor.Program) -> list[Tensor]:
    return [program.levels[name].parameters[0].detach() for name in ("low", "a", "b")]


def same(program: nestor.Program, hand: Hand, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(values(program), [hand.low, hand.a, hand.b], rtol=rtol, atol=0)


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize(("response", "kind"), RESPONSES, ids=lambda value: getattr(value, "describe", lambda: "")())
@pytest.mark.filterwarnings("ignore:Level 'low'")
def test_run_equals_simultaneous_steps(response: nestor.Response, kind: str, unroll: int, nesting: str) -> None:
    """The order in which the two are listed changes no number."""
    program, hand = peers(response, unroll, nesting=nesting), Hand(kind)
    engine = nestor.Engine(program, seed=0)
    for count in range(1, 4 * unroll + 1):
        engine.run(1)
        hand.step_low(restarts=count % unroll == 1 or unroll == 1)
        if count % unroll == 0:
            hand.end(["a", "b"])
        same(program, hand)


@pytest.mark.parametrize(("response", "kind"), RESPONSES, ids=lambda value: getattr(value, "describe", lambda: "")())
def test_lower_history_restarts_when_either_peer_has_stepped(response: nestor.Response, kind: str) -> None:
    """a waits for a lower of its own: when it steps, it differentiates the lower's steps since b's last step."""
    program, hand = peers(response, slow=2), Hand(kind)
    engine = nestor.Engine(program, seed=0)
    for count in range(1, 7):
        engine.run(1)
        hand.step_low(restarts=True)
        hand.end(["b"] if count % 2 else ["a", "b"])
        same(program, hand)


@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.Unrolled()], ids=lambda r: r.describe())
def test_listing_the_peers_the_other_way_round_changes_no_bit(response: nestor.Response) -> None:
    """Neither sees the other's step."""
    one = peers(response, 2)
    problems = {name: copy.deepcopy(level.problem) for name, level in one.levels.items()}
    other = nestor.Program(low=problems["low"], b=problems["b"], a=problems["a"])
    for program in (one, other):
        nestor.Engine(program, seed=0).run(6)
    assert all(torch.equal(x, y) for x, y in zip(values(one), values(other), strict=True))


class Chained:
    """A shared middle level above a leaf; b waits for a lower of its own, so it steps an engine step after a."""

    def __init__(self, response: nestor.Response) -> None:
        leaf, low, own, a, b = (nestor.Variable(torch.tensor(v, dtype=F64)) for v in (0.3, 0.5, 0.1, 0.9, 1.3))
        self.a, self.b, self.low, self.leaf = a, b, low, leaf

        def leaf_loss(leaf: Any, low: Any) -> Tensor:
            return (leaf() - 0.2 * low()) ** 2

        def middle(low: Any, leaf: Any, a: Any, b: Any) -> Tensor:
            return (low() - a() * b()) ** 2 + 0.1 * low() ** 4 + 0.2 * low() * leaf()

        def own_loss(own: Any, b: Any) -> Tensor:
            return (own() - 1) ** 2

        def first(low: Any, a: Any) -> Tensor:
            return (low() - 1) ** 2 + (a() - 1) ** 2

        def second(low: Any, own: Any, b: Any) -> Tensor:
            return (low() - 2) ** 2 + (b() - 2) ** 2

        def problem(variable: nestor.Variable, loss: Any, **options: Any) -> nestor.Problem:
            return nestor.Problem(variable, loss, optimizer=SGD(variable.parameters(), lr=0.05), **options)

        self.program = nestor.Program(
            leaf=problem(leaf, leaf_loss, unroll_steps=2, response=nestor.FirstOrder()),
            low=problem(low, middle, response=response),
            own=problem(own, own_loss, unroll_steps=3),
            a=problem(a, first),
            b=problem(b, second),
        )


@pytest.mark.parametrize("kind", ["mixed", "solved", "unrolled"])
def test_the_value_of_a_peer_is_noted_until_the_lower_steps(kind: str) -> None:
    """Engine step 2: leaf, low, a. Engine step 3: leaf, own, b, with the value of a at low's last step."""
    response = {"mixed": nestor.T1T2(), "solved": nestor.Implicit(solver=nestor.DenseSolve())}
    chained = Chained(response.get(kind, nestor.Unrolled()))
    assert chained.program.peers("b") == ("a",)
    engine = nestor.Engine(chained.program, seed=0)
    engine.run(1)
    before = chained.low.value.detach().clone()
    a = chained.a.value.detach().clone()
    engine.run(1)
    assert not torch.equal(a, chained.a.value)
    b, low, leaf = (v.value.detach().clone().requires_grad_() for v in (chained.b, chained.low, chained.leaf))
    saved = copy.deepcopy(engine.state_dict())
    engine.run(1)

    def gradient(low: Tensor, leaf: Tensor) -> Tensor:
        value = (low - a * b) ** 2 + 0.1 * low**4 + 0.2 * low * leaf
        return torch.autograd.grad(value, low, create_graph=True)[0]

    direct, cotangent = 2 * (b - 2), 2 * (low - 2)
    if kind == "unrolled":
        start = before.clone().requires_grad_()
        # The leaf has stepped since, but low's step has used the value that it had after engine step 2.
        after = start - 0.05 * gradient(start, leaf)
        assert (after - low).abs() < 1e-15
        through = torch.autograd.grad(after, b, cotangent)[0]
    else:
        found = gradient(low, chained.leaf.value.detach())
        if kind == "solved":
            cotangent = cotangent / torch.autograd.grad(found, low, retain_graph=True)[0]
        through = -torch.autograd.grad(found, b, cotangent)[0]
    torch.testing.assert_close(chained.b.value.detach(), (b - 0.05 * (direct + through)).detach(), rtol=1e-12, atol=0)
    # A resumed run has the note too.
    again = Chained(response.get(kind, nestor.Unrolled()))
    resumed = nestor.Engine(again.program, seed=0)
    resumed.load_state_dict(saved)
    resumed.run(1)
    assert torch.equal(again.b.value, chained.b.value)


def test_a_replay_of_a_peer_takes_the_value_that_the_other_had_at_each_step() -> None:
    """Two steps of a between two steps of the top; b moves after each. Written out for numbers, to second order."""
    low, a, b, top = (nestor.Variable(torch.tensor(v, dtype=F64)) for v in (0.3, 0.9, 1.2, 0.7))

    def inner(low: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (low - a * b) ** 2 + 0.1 * low**4

    def first(low: Tensor, a: Tensor, top: Tensor) -> Tensor:
        return (low - 1) ** 2 * a + (a - top) ** 2

    def problem(variable: nestor.Variable, loss: Any, **options: Any) -> nestor.Problem:
        return nestor.Problem(variable, loss, optimizer=SGD(variable.parameters(), lr=0.05), **options)

    with pytest.warns(nestor.errors.NestorWarning, match="joint equilibrium"):
        program = nestor.Program(
            low=problem(low, lambda low, a, b: inner(low(), a(), b())),
            a=problem(a, lambda low, a, top: first(low(), a(), top()), unroll_steps=2, response=nestor.Unrolled()),
            b=problem(b, lambda low, b, top: (low() - 2) ** 2 + (b() - 2) ** 2, response=nestor.FirstOrder()),
            top=problem(top, lambda a, b, top: a() ** 3 + 0.1 * b() + 0.3 * (top() - 2) ** 2),
        )
    engine = nestor.Engine(program, seed=0)
    engine.run(2)  # the steps of a, without the top's between them, start at step 3
    starts: list[tuple[Tensor, Tensor, Tensor]] = []

    class Note(nestor.callbacks.Callback):
        def on_level_step(self, engine: Any, level: str) -> None:
            if level == "low":  # the values at which a's step is taken
                starts.append(tuple(v.value.detach().clone() for v in (low, a, b)))  # type: ignore[arg-type]

    engine = nestor.Engine(program, callbacks=[Note()], seed=0)
    before = top.value.detach().clone()
    engine.run(2)
    assert len({tuple(map(float, s)) for s in starts}) == 2
    assert starts[0][2] != starts[1][2]
    leaf = before.clone().requires_grad_()
    point = starts[0][1].clone().requires_grad_()
    for at_low, at_a, at_b in starts:
        assert (point - at_a).abs() < 1e-15

        def response(value: Tensor, at_low: Tensor = at_low, at_a: Tensor = at_a, at_b: Tensor = at_b) -> Tensor:
            """T1T2's response of low to a, to second order: its derivative is minus the mixed one, at low and a."""
            x, y = at_low.clone().requires_grad_(), at_a.clone().requires_grad_()
            (g,) = torch.autograd.grad(inner(x, y, at_b), x, create_graph=True)
            (mixed,) = torch.autograd.grad(g, y, create_graph=True)
            by_low = torch.autograd.grad(mixed, x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            by_a = torch.autograd.grad(mixed, y, allow_unused=True, materialize_grads=True)[0]
            slope = -mixed.detach()
            moved = value - at_a
            return at_low + slope * moved + 0.5 * (-by_a - by_low * slope) * moved**2

        (gradient,) = torch.autograd.grad(first(response(point), point, leaf), point, create_graph=True)
        point = point - 0.05 * gradient
    expected = torch.autograd.grad(point**3 + 0.3 * (leaf - 2) ** 2, leaf)[0]
    got = (before - top.value.detach()) / 0.05
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_frozen_replay_takes_the_constants_of_the_steps(checkpoint: str) -> None:
    """A level in between has stepped before the top does; the lower's steps have used its value before."""
    low, mid, top = (nestor.Variable(torch.tensor(v, dtype=F64)) for v in (0.3, 0.9, 0.7))

    def inner(low: Tensor, mid: Tensor, top: Tensor) -> Tensor:
        return (low - mid * top) ** 2 + 0.1 * low**4

    def problem(variable: nestor.Variable, loss: Any, **options: Any) -> nestor.Problem:
        return nestor.Problem(variable, loss, optimizer=SGD(variable.parameters(), lr=0.1), **options)

    program = nestor.Program(
        nesting="frozen",
        low=problem(
            low,
            lambda low, mid, top: inner(low(), mid(), top()),
            unroll_steps=2,
            response=nestor.Unrolled(checkpoint=checkpoint),
        ),
        mid=problem(mid, lambda mid, low, top: (low() - 1) ** 2 + mid() ** 2),
        top=problem(top, lambda low, top, mid: (low() - 2) ** 2 + top() ** 2),
    )
    assert program.lowers("top") == ("low", "mid")
    point, (at_mid, at_top) = (
        low.value.detach().clone().requires_grad_(),
        (v.value.detach().clone() for v in (mid, top)),
    )
    leaf = at_top.clone().requires_grad_()
    nestor.Engine(program, seed=0).run(2)
    for _ in range(2):
        point = point - 0.1 * torch.autograd.grad(inner(point, at_mid, leaf), point, create_graph=True)[0]
    (expected,) = torch.autograd.grad((point - 2) ** 2 + leaf**2, leaf)
    torch.testing.assert_close((at_top - top.value.detach()) / 0.1, expected, rtol=1e-11, atol=0)


def test_rule_of_a_replay_reads_the_peer_as_it_was() -> None:
    """A learned rate and a learned rate of an update rule, each the variable of a peer that has stepped before."""

    def lower(low: Any, b: Any) -> Tensor:
        return (low() - b()) ** 2 + 0.1 * low() ** 4

    def rule(params: list[Tensor], grads: list[Tensor], state: Any, rate: Any) -> tuple[list[Tensor], Any]:
        return [p - rate() * g for p, g in zip(params, grads, strict=True)], None

    for learned in (True, False):
        low, rate, b = (nestor.Variable(torch.tensor(v, dtype=F64)) for v in (0.3, 0.1, 0.7))
        options: dict[str, Any] = {"update": rule}
        if learned:
            options = {"optimizer": SGD(low.parameters(), lr=rate.value)}
        program = nestor.Program(
            low=nestor.Problem(low, lower, unroll_steps=2, response=nestor.Unrolled(), **options),
            rate=nestor.Problem(rate, lambda low: (low() - 1) ** 2, optimizer=SGD(rate.parameters(), lr=0.01)),
            b=nestor.Problem(b, lambda low, b: (low() - 2) ** 2, optimizer=SGD(b.parameters(), lr=0.01)),
        )
        assert program.peers("b") == ("rate",)
        point, at_rate = low.value.detach().clone().requires_grad_(), rate.value.detach().clone()
        leaf = b.value.detach().clone().requires_grad_()
        nestor.Engine(program, seed=0).run(2)
        assert not torch.equal(rate.value, at_rate)
        for _ in range(2):
            loss = (point - leaf) ** 2 + 0.1 * point**4
            point = point - at_rate * torch.autograd.grad(loss, point, create_graph=True)[0]
        (expected,) = torch.autograd.grad((point - 2) ** 2, leaf)
        torch.testing.assert_close((leaf - b.value).detach() / 0.01, expected, rtol=1e-10, atol=0)
