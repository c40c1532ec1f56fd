"""Learned hyperparameters: each one of every optimizer, against differences of plain runs, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

import nestor

Options = dict[str, Any]

# Options with which every hyperparameter has an effect.
BASES: dict[type[Optimizer], list[Options]] = {
    SGD: [
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "nesterov": True},
    ],
    Adam: [{"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}, {"lr": 0.1, "eps": 0.01, "amsgrad": True}],
    AdamW: [{"lr": 0.1, "eps": 0.01}],
    RMSprop: [
        {"lr": 0.1, "eps": 0.01, "momentum": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "eps": 0.01, "centered": True},
    ],
    Adagrad: [{"lr": 0.1, "eps": 0.01, "lr_decay": 0.1, "weight_decay": 0.1}],
    Adadelta: [{"lr": 0.5, "eps": 0.01, "weight_decay": 0.1}],
    NAdam: [
        {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1},
        {"lr": 0.1, "eps": 0.01, "decoupled_weight_decay": True},
    ],
    RAdam: [
        {"lr": 0.1, "eps": 0.01, "betas": (0.5, 0.5), "weight_decay": 0.1},
        {"lr": 0.1, "eps": 0.01, "betas": (0.5, 0.5), "decoupled_weight_decay": True},
    ],
    Adamax: [{"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}],
    ASGD: [{"lr": 0.1, "lambd": 0.1, "t0": 1.0, "weight_decay": 0.1}],
    Rprop: [{"lr": 0.1}],
}
SCALES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
STEPS = 4


def numbers(options: Options) -> list[tuple[Any, ...]]:
    """Where numbers are among the hyperparameters: ``("lr",)``, ``("betas", 0)``."""
    found: list[tuple[Any, ...]] = []
    for name, value in options.items():
        if isinstance(value, tuple):
            found += [(name, index) for index in range(len(value))]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((name,))
    return found


CASES = [
    (kind, base, path)
    for kind, bases in BASES.items()
    for base in bases
    for path in numbers(kind([torch.zeros(1)], **base).defaults)
]
IDS = [f"{kind.__name__}-{index}-{'-'.join(map(str, path))}" for index, (kind, _, path) in enumerate(CASES)]
assert len(CASES) > 60


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """In double precision also what torch makes itself: step counters, the rates of ASGD, the products of NAdam."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss(theta: Tensor) -> Tensor:
    return (SCALES * (theta - 1) ** 2).sum() + 0.1 * (theta**4).sum()


def upper_loss(theta: Tensor) -> Tensor:
    return (theta**2 * SCALES.flip(0)).sum()


def start() -> Tensor:
    return torch.tensor([0.3, -0.4, 1.7], dtype=torch.float64)


def at(kind: type[Optimizer], base: Options, path: tuple[Any, ...]) -> float:
    value = kind([torch.zeros(1)], **base).defaults[path[0]]
    return float(value[path[1]] if len(path) == 2 else value)


def put(optimizer: Optimizer, path: tuple[Any, ...], value: Any) -> None:
    for group in optimizer.param_groups:
        if len(path) == 1:
            group[path[0]] = value
        else:
            parts = list(group[path[0]])
            parts[path[1]] = value
            group[path[0]] = tuple(parts)


def plain(kind: type[Optimizer], base: Options, path: tuple[Any, ...], number: float, first: int = 0) -> float:
    """A run of torch's own optimizer, with another hyperparameter from the step ``first`` on."""
    theta = start().requires_grad_()
    optimizer = kind([theta], **base)
    for step in range(STEPS):
        if step == first:
            put(optimizer, path, number)
        optimizer.zero_grad()
        loss(theta).backward()
        optimizer.step()
    return upper_loss(theta.detach()).item()


def difference(function: Callable[[float], float], point: float, step: float, *, one_sided: bool) -> float:
    """Fourth order, central or to the right."""
    if one_sided:
        values = [function(point + k * step) for k in range(5)]
        return sum(c * v for c, v in zip((-25, 48, -36, 16, -3), values, strict=True)) / (12 * step)
    values = [function(point + k * step) for k in (1, -1, 2, -2)]
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)


def program(
    optimizer: Callable[[Tensor], Optimizer], number: nestor.Variable, response: nestor.Response
) -> nestor.Program:
    theta = nestor.Variable(start())
    return nestor.Program(
        theta=nestor.Problem(
            theta, lambda theta: loss(theta()), optimizer=optimizer(theta.value), unroll_steps=STEPS, response=response
        ),
        number=nestor.Problem(number, lambda theta: upper_loss(theta()), optimizer=SGD(number.parameters(), lr=1e-3)),
    )


def run(kind: type[Optimizer], base: Options, path: tuple[Any, ...], response: nestor.Response) -> float:
    """The hypergradient that an engine steps with."""
    number = nestor.Variable(torch.tensor(at(kind, base, path), dtype=torch.float64))

    def make(theta: Tensor) -> Optimizer:
        optimizer = kind([theta], **base)
        put(optimizer, path, number.value)
        return optimizer

    built = program(make, number, response)
    before = number.value.item()
    nestor.Engine(built, seed=0).run(STEPS)
    return (before - number.value.item()) / 1e-3


@pytest.mark.parametrize(("kind", "base", "path"), CASES, ids=IDS)
def test_unrolled(kind: type[Optimizer], base: Options, path: tuple[Any, ...]) -> None:
    """Right, or refused when the program is built."""
    point = at(kind, base, path)
    if path == ("initial_accumulator_value",):
        with pytest.raises(nestor.UnsupportedError, match=r"(?s)initial_accumulator_value is read when.*update="):
            run(kind, base, path, nestor.Unrolled())
        return
    if path == ("momentum",) and point == 0:
        with pytest.raises(nestor.UnsupportedError, match=r"(?s)momentum.*zero.*update="):
            run(kind, base, path, nestor.Unrolled())
        return
    size = 2e-5 * (point or 1.0)
    expected = difference(lambda v: plain(kind, base, path, v), point, size, one_sided=point == 0)
    got = run(kind, base, path, nestor.Unrolled())
    assert abs(got - expected) <= 1e-6 * max(abs(expected), 1e-2)
    forward = run(kind, base, path, nestor.ForwardUnrolled())
    assert abs(forward - expected) <= 1e-6 * max(abs(expected), 1e-2)


@pytest.mark.parametrize(("kind", "base", "path"), CASES, ids=IDS)
def test_fixed_point(kind: type[Optimizer], base: Options, path: tuple[Any, ...]) -> None:
    """SAMA takes the last step alone."""
    point = at(kind, base, path)
    if path == ("initial_accumulator_value",) or (path == ("momentum",) and point == 0):
        return
    size = 2e-5 * (point or 1.0)
    expected = difference(lambda v: plain(kind, base, path, v, STEPS - 1), point, size, one_sided=point == 0)
    got = run(kind, base, path, nestor.SAMA())
    assert abs(got - expected) <= 1e-6 * max(abs(expected), 1e-2)


def test_fixed_point_is_solved() -> None:
    """A learned weight decay moves the fixed point of gradient descent: differences of minimisers."""

    def solved(decay: float) -> float:
        theta = start().requires_grad_()
        optimizer = SGD([theta], lr=0.1, weight_decay=decay)
        for _ in range(400):
            optimizer.zero_grad()
            loss(theta).backward()
            optimizer.step()
        return upper_loss(theta.detach()).item()

    decay = nestor.Variable(torch.tensor(0.2))
    response = nestor.Implicit(condition=nestor.FixedPoint(), solver=nestor.GMRES(rtol=1e-12))
    built = program(lambda theta: SGD([theta], lr=0.1, weight_decay=decay.value), decay, response)
    built = nestor.Program(
        theta=nestor.Problem(
            built.levels["theta"].problem.module,
            built.levels["theta"].problem.loss,
            optimizer=built.levels["theta"].problem.optimizer,
            unroll_steps=400,
            response=response,
        ),
        number=built.levels["number"].problem,
    )
    nestor.Engine(built, seed=0).run(400)
    expected = difference(solved, 0.2, 1e-3, one_sided=False)
    assert abs((0.2 - decay.value.item()) / 1e-3 - expected) <= 1e-6 * abs(expected)


def pair(make: Callable[[Tensor, nestor.Variable], Optimizer], values: list[float]) -> tuple[Tensor, Tensor]:
    """The hypergradient of a vector of hyperparameters, and its differences."""
    vector = nestor.Variable(torch.tensor(values))
    built = program(lambda theta: make(theta, vector), vector, nestor.Unrolled())
    before = vector.value.detach().clone()
    nestor.Engine(built, seed=0).run(STEPS)
    got = (before - vector.value.detach()) / 1e-3

    def end(entry: int, shift: float) -> float:
        theta, moved = start().requires_grad_(), nestor.Variable(torch.tensor(values))
        with torch.no_grad():
            moved.value[entry] += shift
        optimizer = make(theta, moved)
        for group in optimizer.param_groups:
            group["betas"] = tuple(b.item() for b in group["betas"])
            group["lr"] = group["lr"].item()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(theta).backward()
            optimizer.step()
        return upper_loss(theta.detach()).item()

    differences = [
        difference(lambda v, entry=entry: end(entry, v), 0.0, 1e-5, one_sided=False)  # type: ignore[misc]
        for entry in range(len(values))
    ]
    return got, torch.tensor(differences)


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam, Adamax])
def test_both_betas_and_the_rate_are_entries_of_one_variable(kind: type[Optimizer]) -> None:
    """Views of a variable move with it, and so does the optimizer."""

    def make(theta: Tensor, vector: nestor.Variable) -> Optimizer:
        rate, first, second = vector.value.unbind()
        return kind([theta], lr=rate, betas=(first, second), eps=0.01)  # type: ignore[call-arg]

    got, expected = pair(make, [0.1, 0.6, 0.7])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "function",
    [lambda v: F.softplus(v), lambda v: v.exp() / 2, lambda v: 2 * v, lambda v: v.clone()],
    ids=["softplus", "exp", "scaled", "copy"],
)
def test_function_of_a_variable_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    """It is evaluated once, so no later value of the variable reaches the optimizer; the message shows the rewrite."""
    raw = nestor.Variable(torch.tensor(0.1))
    with pytest.raises(nestor.UnsupportedError, match=r"(?s)level 'theta'.*lr is computed.*Problem\(update=update\)"):
        program(lambda theta: SGD([theta], lr=function(raw.value)), raw, nestor.Unrolled())
    with pytest.raises(nestor.UnsupportedError, match=r"betas\[1\] is computed"):
        program(lambda theta: Adam([theta], betas=(raw.value.detach(), function(raw.value))), raw, nestor.Unrolled())


def test_the_rewrite_of_the_message() -> None:
    """A learning rate that is the softplus of a variable, in an update rule."""

    def update(params: list[Tensor], grads: list[Tensor], state: Any, raw: Any) -> tuple[list[Tensor], Any]:
        return [p - F.softplus(raw()) * g for p, g in zip(params, grads, strict=True)], state

    raw, theta = nestor.Variable(torch.tensor(-2.0)), nestor.Variable(start())
    built = nestor.Program(
        theta=nestor.Problem(
            theta, lambda theta: loss(theta()), update=update, unroll_steps=STEPS, response=nestor.Unrolled()
        ),
        raw=nestor.Problem(raw, lambda theta: upper_loss(theta()), optimizer=SGD(raw.parameters(), lr=1e-3)),
    )
    nestor.Engine(built, seed=0).run(STEPS)

    def end(value: float) -> float:
        return plain(SGD, {"lr": 0.1}, ("lr",), F.softplus(torch.tensor(value)).item())

    expected = difference(end, -2.0, 1e-4, one_sided=False)
    assert abs((-2.0 - raw.value.item()) / 1e-3 - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.FiniteDifference(), nestor.Implicit()])
def test_response_without_steps_is_refused(response: nestor.Response) -> None:
    """Not a silent zero."""
    rate = nestor.Variable(torch.tensor(0.1))
    with pytest.raises(nestor.UnsupportedError, match=r"lr is a variable of level 'number'.*Unrolled"):
        program(lambda theta: SGD([theta], lr=rate.value), rate, response)


def test_tensor_of_another_level_or_of_many_numbers() -> None:
    """Named before a run."""
    rate, stranger = nestor.Variable(torch.tensor(0.1)), nestor.Variable(torch.ones(3))

    def make(value: Tensor) -> Callable[[Tensor], Optimizer]:
        def made(theta: Tensor) -> Optimizer:
            optimizer = SGD([theta], lr=0.1)
            optimizer.param_groups[0]["lr"] = value
            return optimizer

        return made

    with pytest.raises(nestor.UnsupportedError, match="lr requires a gradient but is no variable of a level above"):
        program(make(nestor.Variable(torch.tensor(0.1)).value), rate, nestor.Unrolled())
    with pytest.raises(nestor.UnsupportedError, match="lr is a tensor of 3 numbers"):
        program(make(stranger.value), stranger, nestor.Unrolled())
