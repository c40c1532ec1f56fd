"""The programs and the pictures of the page on the graph, against re-solved finite differences in plain torch."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nestor

PAGE = (Path(__file__).parents[2] / "docs" / "graph.md").read_text(encoding="utf-8")
SETUP, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PICTURES = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
STEPS = re.findall(r"Steps: `([a-z ]+) \.\.\.`", PAGE)
NAMES = ["chain", "peers", "hierarchy"]


def page(place: int) -> tuple[nestor.Program, Mapping[str, Callable[..., Tensor]]]:
    """Run a block of the page; return its program, and its losses as functions of tensors."""
    namespace: dict[str, Any] = {}
    for block in (SETUP, BLOCKS[place]):
        exec(compile(block, "docs/graph.md", "exec"), namespace)
    program = namespace[NAMES[place]]

    def loss(name: str) -> Callable[..., Tensor]:
        function = program.levels[name].problem.loss
        return lambda **values: function(**{key: lambda value=value: value for key, value in values.items()})

    return program, {name: loss(name) for name in program.levels}


def solved(loss: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """The minimizer of a loss whose entries are independent, by Newton's method; differentiable twice in ``given``."""

    def step(x: Tensor, values: tuple[Tensor, ...], *, attached: bool) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad(loss(x, *values), x, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), x, create_graph=attached)
        return x - gradient / curvature, gradient.detach()

    point, size = torch.full_like(given[0], 0.5), torch.tensor(1.0)
    constants = tuple(g.detach() for g in given)
    while size.norm() > 1e-14:
        before = point
        point, size = step(point.detach().requires_grad_(), constants, attached=False)
        if torch.equal(point, before):
            break
    point = point.detach().requires_grad_()
    for _ in range(2 if any(g.requires_grad for g in given) else 0):  # each makes one more order right
        point, _ = step(point, given, attached=True)
    return point


def derivative(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """A finite difference of fourth order, for each entry."""
    step, found = 1e-4, torch.zeros_like(point)
    for entry in range(len(point)):
        for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            moved = point.clone()
            moved[entry] += shift * step
            found[entry] += weight * function(moved).detach() / (12 * step)
    return found


Target = tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]
"""The values of all levels, those below a level solved; and the level's objective, which solves them again."""

POINT, OTHER = torch.tensor([0.7, 1.3], dtype=torch.float64), torch.tensor([1.1, 0.6], dtype=torch.float64)


def chain(losses: Any) -> dict[str, Target]:
    def low_of(mid: Tensor) -> Tensor:
        return solved(lambda low, mid: losses["low"](low=low, mid=mid), mid)

    def objective(mid: Tensor, top: Tensor) -> Tensor:
        return losses["mid"](mid=mid, low=low_of(mid), top=top)

    def mid_of(top: Tensor) -> Tensor:
        return solved(objective, top).detach()

    mid = mid_of(POINT)
    return {
        "mid": ({"low": low_of(OTHER), "mid": OTHER, "top": POINT}, lambda mid: objective(mid, POINT)),
        "top": (
            {"low": low_of(mid), "mid": mid, "top": POINT},
            lambda top: losses["top"](top=top, mid=mid_of(top)),
        ),
    }


def peers(losses: Any) -> dict[str, Target]:
    def low_of(a: Tensor, b: Tensor) -> Tensor:
        return solved(lambda low, a, b: losses["low"](low=low, a=a, b=b), a, b)

    values = {"low": low_of(POINT, OTHER), "a": POINT, "b": OTHER}
    return {
        "a": (values, lambda a: losses["a"](a=a, low=low_of(a, OTHER))),
        "b": (values, lambda b: losses["b"](b=b, low=low_of(POINT, b))),
    }


def hierarchy(losses: Any) -> dict[str, Target]:
    def side_of(top: Tensor) -> Tensor:
        return solved(lambda side, top: losses["side"](side=side, top=top), top)

    below = chain({**losses, "top": lambda top, mid: losses["top"](top=top, mid=mid, side=side_of(top))})
    return {name: ({**values, "side": side_of(POINT)}, objective) for name, (values, objective) in below.items()}


TARGETS = [chain, peers, hierarchy]


def compared(program: nestor.Program, name: str, target: Target) -> tuple[Tensor, Tensor]:
    """The hypergradient of a level at given values, and the finite difference of its objective."""
    values, objective = target
    with torch.no_grad():
        for other, value in values.items():
            program.levels[other].parameters[0].copy_(value)
    return program.hypergradient(name)["value"], derivative(objective, values[name])


def with_nesting(program: nestor.Program, nesting: str) -> nestor.Program:
    return nestor.Program(nesting=nesting, **{name: level.problem for name, level in program.levels.items()})


@pytest.mark.parametrize("place", range(3), ids=NAMES)
def test_hypergradients_equal_finite_differences_of_the_resolved_program(place: int) -> None:
    """Of every level with lowers; the levels below are solved again at each point, the others stay."""
    program, losses = page(place)
    targets = TARGETS[place](losses)
    assert list(targets) == [name for name in program.levels if program.lowers(name)]
    for name, target in targets.items():
        got, expected = compared(program, name, target)
        assert (got - expected).norm() <= 1e-8 * expected.norm(), name


@pytest.mark.parametrize("place", range(3), ids=NAMES)
def test_frozen_is_exact_where_the_page_says_so(place: int) -> None:
    """For a level whose lowers have no lowers; for the others, with the curvature of a loss alone, written out."""
    program, losses = page(place)
    program = with_nesting(program, "frozen")
    for name, target in TARGETS[place](losses).items():
        got, expected = compared(program, name, target)
        is_exact = not any(program.lowers(lower) for lower in program.lowers(name))
        assert is_exact == bool((got - expected).norm() <= 1e-8 * expected.norm())
        if not is_exact:
            written = frozen(losses, {key: value.detach().requires_grad_() for key, value in target[0].items()})
            assert (got - written).norm() <= 1e-10 * written.norm()


def frozen(losses: Any, values: dict[str, Tensor]) -> Tensor:
    """The frozen hypergradient of the top: the lowers of each of its lowers are constants."""
    reads = {"mid": ("low", "mid", "top"), "side": ("side", "top")}
    lowers = [name for name in reads if name in values]
    loss = losses["top"](**{name: values[name] for name in ("top", *lowers)})
    total, *cotangents = torch.autograd.grad(loss, [values["top"], *(values[name] for name in lowers)])
    for name, cotangent in zip(lowers, cotangents, strict=True):
        own = losses[name](**{read: values[read] for read in reads[name]})
        (inner,) = torch.autograd.grad(own, values[name], create_graph=True)
        (curvature,) = torch.autograd.grad(inner.sum(), values[name], retain_graph=True)
        total = total - torch.autograd.grad(inner, values["top"], cotangent / curvature)[0]
    return total


@pytest.mark.parametrize("place", range(3), ids=NAMES)
def test_pictures_and_peers(place: int) -> None:
    """The picture is what the program draws, and the peers are those of the text."""
    program, _ = page(place)
    assert program.to_mermaid() == PICTURES[place]
    expected = [
        {"low": (), "mid": (), "top": ()},
        {"low": (), "a": ("b",), "b": ("a",)},
        {"low": ("side",), "mid": ("side",), "side": ("low", "mid"), "top": ()},
    ]
    assert {name: program.peers(name) for name in program.levels} == expected[place]


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize("place", range(3), ids=NAMES)
def test_order_of_steps(place: int, nesting: str) -> None:
    """As the page says."""
    order: list[str] = []

    class Log(nestor.callbacks.Callback):
        def on_level_step(self, engine: Any, level: str) -> None:
            order.append(level)

    nestor.Engine(with_nesting(page(place)[0], nesting), callbacks=[Log()], seed=0).run(2)
    assert " ".join(order) == STEPS[place]


def test_every_block_is_tested() -> None:
    assert len(BLOCKS) == len(PICTURES) == len(STEPS) == 3
