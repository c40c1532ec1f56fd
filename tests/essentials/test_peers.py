"""Peers: levels of which neither is above the other, in the graph and in the order of steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor
from nestor.levels.peers import levels_above, peers_of

F64 = torch.float64


def order_of(program: nestor.Program, steps: int, **options: Any) -> str:
    """The levels in the order in which they draw a batch, by their first letter."""
    drawn: list[str] = []
    for name, level in program.levels.items():
        level.problem.data.drawn = (drawn, name)
    nestor.Engine(program, seed=0, **options).run(steps)
    return " ".join(drawn)


class Data:
    """Endless batches that note who draws them."""

    drawn: tuple[list[str], str]

    def __iter__(self) -> Any:
        while True:
            self.drawn[0].append(self.drawn[1])
            yield torch.ones((), dtype=F64)


def program(reads: dict[str, str], *, nesting: str = "exact", **options: dict[str, Any]) -> nestor.Program:
    """Levels of one number each, whose losses read themselves and the levels listed."""

    def problem(name: str) -> nestor.Problem:
        others = reads[name].split()
        body = " + ".join(f"(0.5 * {name}() * {other}()).square() + {other}().square()" for other in others)
        source = f"lambda batch, {', '.join([name, *others])}: ({name}() - 1).square() + 0.1 * ({body or '0.0'})"
        variable = nestor.Variable(torch.tensor(0.5, dtype=F64))
        optimizer = torch.optim.SGD(variable.parameters(), lr=0.01)
        return nestor.Problem(variable, eval(source), optimizer=optimizer, data=Data(), **options.get(name, {}))

    return nestor.Program(nesting=nesting, **{name: problem(name) for name in reads})


SHARED = {"l": "a b", "a": "l", "b": "l"}


def test_two_uppers_of_one_lower_are_peers_in_either_order() -> None:
    """Neither reads the other, and the shared lower is not listed between them."""
    for names in (("l", "a", "b"), ("l", "b", "a")):
        built = program({name: SHARED[name] for name in names})
        assert built.peers("a") == ("b",)
        assert built.peers("b") == ("a",)
        assert built.peers("l") == ()
        assert built.lowers("a") == built.lowers("b") == ("l",)
        assert built.uppers("a") == built.uppers("b") == ()
        assert built.uppers("l") == names[1:]


def test_an_argument_that_is_not_used_declares_a_dependence() -> None:
    """One unused argument makes the chain again."""
    built = program({**SHARED, "b": "l"})
    losses = {name: level.problem for name, level in built.levels.items()}

    def reads_a(batch: Any, b: Any, l: Any, a: Any) -> Tensor:  # noqa: E741
        return (l() - b()).square()

    chain = nestor.Program(
        l=losses["l"], a=losses["a"], b=nestor.Problem(losses["b"].module, reads_a, data=losses["b"].data)
    )
    assert chain.peers("a") == chain.peers("b") == ()
    assert chain.lowers("b") == ("l", "a")
    assert chain.uppers("a") == ("b",)


@pytest.mark.parametrize(
    ("reads", "peers"),
    [
        # A chain: l and c are connected through a, which is listed between them.
        ({"l": "a", "a": "l c", "c": "a"}, {"l": "", "a": "", "c": ""}),
        # Two lowers of one upper.
        ({"x": "u", "y": "u", "u": "x y"}, {"x": "y", "y": "x", "u": ""}),
        # Two chains below a common top: levels of different chains are peers.
        (
            {"x": "a", "y": "b", "a": "x u", "b": "y u", "u": "a b"},
            {"x": "y b", "y": "x a", "a": "y b", "b": "x a", "u": ""},
        ),
        # The shared lower is listed between a's own lower and b, but is not below a's own lower.
        ({"x": "a", "l": "a b", "a": "x l", "b": "l"}, {"x": "l b", "l": "x", "a": "b", "b": "x a"}),
        # a reads m, and b reads m: a is below m, m below b.
        ({"a": "m", "m": "", "b": "m"}, {"a": "", "m": "", "b": ""}),
    ],
)
def test_peers_are_what_no_chain_connects(reads: dict[str, str], peers: dict[str, str]) -> None:
    """In the program's order, and symmetric."""
    built = program(reads)
    assert {name: built.peers(name) for name in reads} == {name: tuple(names.split()) for name, names in peers.items()}


def test_only_the_order_of_levels_that_read_each_other_matters() -> None:
    """The partial order is that of every listing that keeps each read pair in order."""
    reads = {"x": ["a"], "l": ["a", "b"], "a": ["x", "l"], "b": ["l"]}
    for names in (["x", "l", "a", "b"], ["l", "x", "b", "a"], ["l", "b", "x", "a"]):
        above = levels_above({name: reads[name] for name in names})
        assert above == {"x": {"a"}, "l": {"a", "b"}, "a": set(), "b": set()}
        assert set(peers_of("b", above)) == {"x", "a"}


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize(
    ("reads", "options", "expected"),
    [
        (SHARED, {}, "l a b l a b l a b"),
        ({"l": "a b", "b": "l", "a": "l"}, {}, "l b a l b a l b a"),
        (SHARED, {"l": {"unroll_steps": 3}}, "l l l a b l l l a b l l l a b"),
        # b does not wait for the unroll_steps of its peer.
        (SHARED, {"a": {"unroll_steps": 3}}, "l a b l a b l a b"),
        (SHARED, {"l": {"unroll_steps": 2, "warmup_steps": 4}}, "l l l l l l a b l l a b"),
        (SHARED, {"l": {"accumulate": 2}}, "l l a b l l a b"),
        (SHARED, {"a": {"accumulate": 2}}, "l a a b l a a b"),
        # Each waits for its own lowers only.
        (
            {"x": "a", "y": "b", "a": "x", "b": "y"},
            {"y": {"unroll_steps": 3}},
            "x y a x y a x y a b x y a",
        ),
        ({"x": "a", "l": "a b", "a": "x l", "b": "l"}, {"x": {"unroll_steps": 2}}, "x l b x l a b x l b x l a b"),
        # Below a common top, which waits for both.
        (
            {"x": "a", "y": "b", "a": "x u", "b": "y u", "u": "a b"},
            {"a": {"unroll_steps": 2}, "y": {"unroll_steps": 3}},
            "x y a x y a x y a b u x y a",
        ),
        # A level that reads the other is above it: the chain of the lower two.
        ({"l": "", "a": "l", "b": "l a"}, {}, "l a b l a b"),
    ],
)
def test_order_of_steps(reads: dict[str, str], options: dict[str, Any], expected: str, nesting: str) -> None:
    """Peers step when their own lowers are ready, in the order listed."""
    built = program(reads, nesting=nesting, **options)
    steps = expected.split().count(next(iter(reads))) // options.get("l", {}).get("accumulate", 1)
    assert order_of(built, steps) == expected


def test_rollback_restores_the_shared_lower_once_for_both() -> None:
    """The look-ahead of the lower ends after both peers have stepped: one more step of the lower, with both new."""
    built = program(SHARED, l={"unroll_steps": 2})
    plain = program(SHARED, l={"unroll_steps": 2})
    l, a, b = (level.parameters[0] for level in plain.levels.values())  # noqa: E741
    loss = plain.levels["l"].problem.loss
    batch = torch.ones((), dtype=F64)
    for _ in range(3):
        start = l.detach().clone()
        for _ in range(2):
            l.data -= 0.01 * torch.autograd.grad(loss(batch, lambda: l, lambda: a, lambda: b), l)[0]
        steps = []
        for name, upper in (("a", a), ("b", b)):
            direct, cotangent = torch.autograd.grad(
                plain.levels[name].problem.loss(batch, lambda upper=upper: upper, lambda: l), [upper, l]
            )
            (inner,) = torch.autograd.grad(loss(batch, lambda: l, lambda: a, lambda: b), l, create_graph=True)
            steps.append(direct - torch.autograd.grad(inner, upper, cotangent)[0])
        for upper, step in zip((a, b), steps, strict=True):
            upper.data -= 0.01 * step
        l.data.copy_(start)
        l.data -= 0.01 * torch.autograd.grad(loss(batch, lambda: l, lambda: a, lambda: b), l)[0]
    for level in built.levels.values():
        level.problem.data.drawn = ([], "")
    nestor.Engine(built, rollback=True, seed=0).run(6)
    for level, other in zip(built.levels.values(), plain.levels.values(), strict=True):
        torch.testing.assert_close(level.parameters[0], other.parameters[0], rtol=1e-12, atol=0)


def test_explain_and_the_picture_show_peers() -> None:
    """A column of the table, and an edge without an arrow; neither without peers."""
    built = program(SHARED)
    rows = {row.level: row for row in built.explain().rows}
    assert rows["a"].peers == ("b",)
    assert rows["b"].lowers == ("l",)
    assert "peers" in str(built.explain())
    assert "    a ---|peers| b\n" in built.to_mermaid()
    assert built.to_mermaid().count("peers") == 1
    chain = program({"l": "a", "a": "l"})
    assert "peers" not in str(chain.explain()) + chain.to_mermaid()


def test_a_level_above_coupled_peers_warns_once() -> None:
    """Their joint equilibrium is not solved for, and the warning says so."""
    coupled = {"l": "a b", "a": "l u", "b": "l u", "u": "a b"}
    with pytest.warns(nestor.errors.NestorWarning, match="'u' is above the peers 'a' and 'b', which level 'l'"):
        built = program(coupled)
    assert built.peers("a") == ("b",)
    assert built.uppers("a") == ("u",)
    assert built.lowers("u") == ("a", "b")
    # Quiet: separate lowers; peers whose response is constant, or not differentiated; a chain.
    program({"x": "a", "y": "b", "a": "x u", "b": "y u", "u": "a b"})
    program({"l": "a b", "a": "l", "b": "l", "u": "a b"})
    program(coupled, a={"response": nestor.FirstOrder()}, b={"response": nestor.FirstOrder()})
    program({"l": "a b", "a": "l u", "b": "l a u", "u": "a b"})


def solved(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """The minimizer of a plain loss, by Newton's method."""
    for _ in range(30):
        x = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        if gradient.norm() < 1e-14:
            break
        rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient]
        point = x - torch.linalg.solve(torch.stack(rows), gradient)
    return point.detach()


EXACT = nestor.Implicit(solver=nestor.DenseSolve())


def test_top_above_coupled_peers_differentiates_each_with_the_other_held_constant() -> None:
    """Against re-solved finite differences: each peer is solved again while the other stays."""

    def low_loss(low: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (low.exp() - low * (1 + a.square() * b.square())).sum()

    def a_loss(low: Tensor, a: Tensor, top: Tensor) -> Tensor:
        return ((low - 1) ** 2).sum() + ((a - top) ** 2).sum() + 0.1 * (a**4).sum()

    def b_loss(low: Tensor, b: Tensor, top: Tensor) -> Tensor:
        return ((low - top) ** 2).sum() + (b - 2).square().sum() + 0.05 * (b**4).sum()

    def top_loss(a: Tensor, b: Tensor, top: Tensor) -> Tensor:
        return (a * b).square().sum() + (a - 0.3).square().sum() + (top - b).square().sum()

    def low_of(a: Tensor, b: Tensor) -> Tensor:
        return torch.log(1 + a.square() * b.square())

    def a_of(b: Tensor, top: Tensor) -> Tensor:
        return solved(lambda a: a_loss(low_of(a, b), a, top), torch.ones_like(b))

    def b_of(a: Tensor, top: Tensor) -> Tensor:
        return solved(lambda b: b_loss(low_of(a, b), b, top), torch.ones_like(a))

    top = torch.tensor([0.7, 1.2], dtype=F64)
    a, b = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)
    for _ in range(60):  # the equilibrium: each is the best response to the other
        a, b = a_of(b, top), b_of(a, top)
    low = low_of(a, b)
    low_, a_, b_, top_ = (nestor.Variable(t.clone()) for t in (low, a, b, top))
    with pytest.warns(nestor.errors.NestorWarning, match="joint equilibrium"):
        built = nestor.Program(
            low=nestor.Problem(low_, lambda low, a, b: low_loss(low(), a(), b()), response=EXACT),
            a=nestor.Problem(a_, lambda low, a, top: a_loss(low(), a(), top()), response=EXACT),
            b=nestor.Problem(b_, lambda low, b, top: b_loss(low(), b(), top()), response=EXACT),
            top=nestor.Problem(top_, lambda a, b, top: top_loss(a(), b(), top())),
        )
    got, step = built.hypergradient("top")["value"], 1e-4
    expected = torch.zeros_like(got)
    for entry in range(2):
        for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # fourth order
            moved = top.clone()
            moved[entry] += shift * step
            expected[entry] += weight * top_loss(a_of(b, moved), b_of(a, moved), moved) / (12 * step)
    assert (got - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("how", [EXACT, nestor.T1T2(), nestor.Unrolled()], ids=lambda r: r.describe())
@pytest.mark.parametrize("nesting", ["exact", "frozen"])
def test_a_start_that_is_a_peer_is_a_constant(how: nestor.Response, nesting: str) -> None:
    """A level that starts from one peer takes its planned steps from there when the other peer is differentiated."""
    meta, rate = torch.tensor([0.5, -0.4], dtype=F64), torch.tensor(0.3, dtype=F64)

    def inner(low: Tensor, rate: Tensor) -> Tensor:
        return rate * (low - 1).square().sum() + 0.1 * (low**4).sum()

    low_, meta_, rate_ = (nestor.Variable(t.clone()) for t in (torch.zeros(2, dtype=F64), meta, rate))
    built = nestor.Program(
        nesting=nesting,
        low=nestor.Problem(
            low_,
            lambda low, rate: inner(low(), rate()),
            init="meta",
            unroll_steps=2,
            optimizer=torch.optim.SGD(low_.parameters(), lr=0.1),
            response=how,
        ),
        meta=nestor.Problem(meta_, lambda low: (low() - 2).square().sum()),
        rate=nestor.Problem(rate_, lambda low: (low() - 3).square().sum()),
    )
    assert built.peers("rate") == ("meta",)
    leaf = rate.clone().requires_grad_()
    low, theta = meta.clone().requires_grad_(), None
    for _ in range(2):
        theta = low
        low = low - 0.1 * torch.autograd.grad(inner(low, leaf), low, create_graph=True)[0]
    assert theta is not None
    if how == nestor.Unrolled():
        (expected,) = torch.autograd.grad((low - 3).square().sum(), leaf)
    else:
        point = low.detach().requires_grad_()
        (cotangent,) = torch.autograd.grad((point - 3).square().sum(), point)
        (gradient,) = torch.autograd.grad(inner(point, leaf), point, create_graph=True)
        if how == EXACT:
            rows = [torch.autograd.grad(g, point, retain_graph=True)[0] for g in gradient]
            cotangent = torch.linalg.solve(torch.stack(rows), cotangent)
        expected = -torch.autograd.grad(gradient, leaf, cotangent)[0]
    torch.testing.assert_close(built.hypergradient("rate")["value"], expected, rtol=1e-10, atol=0)
