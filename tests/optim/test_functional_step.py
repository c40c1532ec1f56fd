"""Differentiable optimizer steps: values of the real optimizer, derivatives of five steps by central differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from nestor.optim import functional_step, optimizer_state

CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    (Adam, {"lr": 0.1}),
    (Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    (Adam, {"lr": 0.01, "maximize": True}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.1, "amsgrad": True}),
    (NAdam, {"lr": 0.1}),
    (NAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (RAdam, {"lr": 0.1, "betas": (0.9, 0.5)}),
    (RAdam, {"lr": 0.1, "weight_decay": 0.1}),
    (Adamax, {"lr": 0.1, "weight_decay": 0.1}),
    (RMSprop, {"lr": 0.1}),
    (RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    (Adagrad, {"lr": 0.1}),
    (Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
    (ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 2}),
    (Rprop, {"lr": 0.1}),
]
IDS = [f"{kind.__name__}-{'-'.join(options)}" for kind, options in CASES]


def loss(params: list[Tensor], weight: Tensor) -> Tensor:
    """Smooth, coupled, not quadratic; a matrix, a vector and a scalar."""
    matrix, vector, scalar = params
    return (
        ((matrix @ vector - 1) ** 2).sum()
        + weight * (vector**2).sum()
        + 0.1 * (matrix**4).sum()
        + torch.exp(scalar * weight) * (1 + vector[0] ** 2)
    )


def start() -> list[Tensor]:
    """The same parameters every time."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3, 4), (4,), ()]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def make(kind: type[Optimizer], params: list[Tensor], options: dict[str, Any]) -> Optimizer:
    """Two parameter groups, the second with half the learning rate."""
    return kind([{"params": params[:2]}, {"params": params[2:], "lr": options["lr"] / 2}], **options)


def unrolled(optimizer: Optimizer, weight: Tensor, steps: int, **kwargs: Any) -> Tensor:
    """The loss, at another weight, after some steps."""
    params, state = [p.requires_grad_() for p in start()], None
    for _ in range(steps):
        grads = torch.autograd.grad(loss(params, weight), params, create_graph=True)
        params, state = functional_step(optimizer, params, grads, state, **kwargs)
    return loss(params, torch.tensor(0.7, dtype=torch.float64))


def central(function: Callable[[Tensor], Tensor], at: float, step: float = 1e-5) -> float:
    """Fourth-order central difference."""
    values = [function(torch.tensor(at + k * step, dtype=torch.float64)).item() for k in (1, -1, 2, -2)]
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_values_are_those_of_the_optimizer(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Five steps, two groups, a scheduler that changes the learning rate and patches ``step``."""
    real = [p.requires_grad_() for p in start()]
    optimizer = make(kind, real, options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    weight = torch.tensor(0.3, dtype=torch.float64)
    params, state = start(), None
    for _ in range(5):
        params = [p.detach().requires_grad_() for p in params]
        grads = torch.autograd.grad(loss(params, weight), params)
        before = [p.detach().clone() for p in real], optimizer_state(optimizer)
        params, state = functional_step(optimizer, params, grads, state)
        assert all(torch.equal(p, q) for p, q in zip(before[0], real, strict=True))
        for kept, now in zip(before[1], optimizer_state(optimizer), strict=True):
            assert all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(now[k])) for k in now)
        optimizer.zero_grad()
        loss(real, weight).backward()
        optimizer.step()
        scheduler.step()
        for got, expected in zip(params, real, strict=True):
            # NAdam multiplies its momentum products in single precision.
            exact = kind is not NAdam
            torch.testing.assert_close(got, expected, rtol=1e-12 if exact else 1e-6, atol=1e-14 if exact else 1e-7)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_derivative_of_five_steps(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """In what the gradients depend on."""
    optimizer = make(kind, start(), options)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(unrolled(optimizer, weight, 5), weight)
    expected = central(lambda w: unrolled(optimizer, w, 5), 0.3)
    assert abs(got.item() - expected) <= 1e-6 * max(abs(expected), 1e-3)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_derivative_in_a_learned_rate(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """A learning rate that is a tensor, in one of the two groups."""
    rate = options["lr"]
    weight = torch.tensor(0.3, dtype=torch.float64)

    def final(lr: Tensor) -> Tensor:
        return unrolled(make(kind, start(), options), weight, 5, groups=[{"lr": lr}, {}])

    lr = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(final(lr), lr)
    expected = central(final, rate, 1e-5 * rate)
    assert abs(got.item() - expected) <= 1e-6 * max(abs(expected), 1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (SGD, {"lr": 0.1}, "weight_decay"),
        (SGD, {"lr": 0.1, "momentum": 0.5}, "momentum"),
        (Adam, {"lr": 0.1, "weight_decay": 0.1}, "weight_decay"),
        (AdamW, {"lr": 0.1, "weight_decay": 0.1}, "weight_decay"),
        (RMSprop, {"lr": 0.1, "alpha": 0.9}, "alpha"),
        (RMSprop, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}, "momentum"),
        (Adagrad, {"lr": 0.1, "weight_decay": 0.2}, "weight_decay"),
    ],
)
def test_derivative_in_other_hyperparameters(kind: type[Optimizer], options: dict[str, Any], name: str) -> None:
    """Weight decay, momentum and smoothing constants can be learned too."""
    value = options.get(name, 0.1)
    weight = torch.tensor(0.3, dtype=torch.float64)

    def final(number: Tensor) -> Tensor:
        return unrolled(make(kind, start(), options), weight, 5, groups=[{name: number}, {name: number}])

    number = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(final(number), number)
    expected = central(final, value)
    assert abs(got.item() - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_zero_gradients_give_no_nan(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """A weight that no sample touches has gradient 0: sqrt(0) must not poison the others."""
    params = [p.requires_grad_() for p in start()]
    optimizer = make(kind, params, options)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first, state = functional_step(optimizer, params, [scale * torch.zeros_like(p) for p in params], None)
    second, _ = functional_step(optimizer, first, [scale * p for p in params], state)
    grads = torch.autograd.grad(sum(p.sum() for p in second), [scale, *params])
    assert all(torch.isfinite(g).all() for g in grads)


def test_missing_gradient_leaves_a_parameter() -> None:
    """As torch does, weight decay included."""
    params = start()
    optimizer = make(AdamW, params, {"lr": 0.1})
    new, state = functional_step(optimizer, params, [torch.ones_like(params[0]), None, None], None)
    assert not torch.equal(new[0], params[0])
    assert torch.equal(new[1], params[1])
    assert state[1] == {}


def test_goes_on_from_the_optimizers_state() -> None:
    """The state of a running optimizer is the state of the function."""
    params = [p.requires_grad_() for p in start()]
    optimizer = make(Adam, params, {"lr": 0.1})
    for _ in range(3):
        optimizer.zero_grad()
        loss(params, torch.tensor(0.3).double()).backward()
        optimizer.step()
    grads = [p.grad for p in params]
    got, _ = functional_step(optimizer, [p.detach() for p in params], grads, optimizer_state(optimizer))
    optimizer.step()
    for value, expected in zip(got, params, strict=True):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)


def test_second_derivative() -> None:
    """The step is differentiable to any order."""
    optimizer = make(Adam, start(), {"lr": 0.1})
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def slope(w: Tensor) -> Tensor:
        w = w if w.requires_grad else w.requires_grad_()
        return torch.autograd.grad(unrolled(optimizer, w, 2), w, create_graph=True)[0]

    (got,) = torch.autograd.grad(slope(weight), weight)
    assert abs(got.item() - central(slope, 0.3)) <= 1e-6 * abs(got.item())


class Quiet(Optimizer):
    """A third-party optimizer that takes the flag and ignores it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "differentiable": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Gradient descent."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class Data(Quiet):
    """One that writes to ``.data``."""

    def step(self, closure: Any = None) -> None:
        """Gradient descent."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad.data)


@pytest.mark.parametrize("kind", [Quiet, Data])
def test_optimizer_that_ignores_the_flag_is_detected(kind: type[Quiet]) -> None:
    """Not a silent zero."""
    params = [p.requires_grad_() for p in start()]
    grads = torch.autograd.grad(loss(params, torch.tensor(1.0)), params, create_graph=True)
    with pytest.raises(TypeError, match=r"no_grad.*update="):
        functional_step(kind(params, lr=0.1), params, grads, None)


@pytest.mark.parametrize("kind", [LBFGS, SparseAdam, Adafactor, Muon])
def test_optimizers_without_a_differentiable_step(kind: type[Optimizer]) -> None:
    """A clear error that says what to do."""
    matrix = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(TypeError, match=f"{kind.__name__} has no differentiable step"):
        functional_step(kind([matrix]), [matrix], [torch.ones(2, 2)], None)


def test_wrong_number_of_tensors() -> None:
    """Named, before anything happens."""
    params = start()
    with pytest.raises(ValueError, match="holds 3 parameters, and the step was given 2"):
        functional_step(SGD(params, lr=0.1), params[:2], params[:2], None)
