"""A function that reads tensors besides its arguments: an error names them, and what to write instead."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cells import Cell, iterate
from torch import Tensor, nn

import nestor
from nestor.autodiff.instruments import counting


def closed_over(kind: str) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """An update ``z -> tanh(W z + x) / 2`` whose ``W`` is no argument, and how the error names it."""
    cell, weight, free = nn.Linear(3, 3, bias=False), 0.3 * torch.randn(3, 3), torch.randn(3, 3, requires_grad=True)
    weight.requires_grad_()
    made = 0.3 * free

    class Bare:
        def __init__(self) -> None:
            self.weight = weight

        def update(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ self.weight + x) / 2

        def __call__(self, z: Tensor, x: Tensor) -> Tensor:
            return self.update(z, x)

    class Supernet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alphas = weight  # a plain tensor: no parameter

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ self.alphas + x) / 2

    def bound(weight: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x) / 2

    kinds: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
        "module": (lambda z, x: torch.tanh(cell(z) + x) / 2, "'cell.weight' of shape (3, 3)"),
        "parameter": (lambda z, x: torch.tanh(z @ cell.weight + x) / 2, "'cell.weight' of shape (3, 3)"),
        "tensor": (lambda z, x: torch.tanh(z @ weight + x) / 2, "'weight' of shape (3, 3)"),
        "not a leaf": (lambda z, x: torch.tanh(z @ made + x) / 2, "'free' of shape (3, 3)|a tensor of shape (3, 3)"),
        "partial": (functools.partial(bound, weight), "of shape (3, 3)"),
        "method": (Bare().update, "of shape (3, 3)"),
        "object": (Bare(), "of shape (3, 3)"),
        "module's plain tensor": (Supernet(), "'self.alphas' of shape (3, 3)"),
    }
    return kinds[kind]


KINDS = ["module", "parameter", "tensor", "not a leaf", "partial", "method", "object", "module's plain tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point(kind: str) -> None:
    """At the call where the function's own variables hold the tensor, else in the reverse pass."""
    update, name = closed_over(kind)
    x = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(nestor.UnsupportedError, match="|".join(map(re.escape, name.split("|")))) as caught:
        nestor.fixed_point(update, torch.zeros(5, 3), x).sum().backward()
    assert "nestor.fixed_point(module, theta, inputs)" in str(caught.value)
    assert x.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_gradients(kind: str) -> None:
    """No reverse pass would reach the function: the call raises."""
    update, _ = closed_over(kind)
    with pytest.raises(nestor.UnsupportedError, match="not among its arguments"):
        nestor.fixed_point(update, torch.zeros(5, 3), torch.randn(5, 3))
    with torch.no_grad():
        nestor.fixed_point(update, torch.zeros(5, 3), torch.randn(5, 3))


@pytest.mark.parametrize(
    "response",
    [
        nestor.T1T2(),
        nestor.T1T2(cross=nestor.ForwardMode()),
        nestor.Implicit(),
        nestor.FiniteDifference(),
        nestor.SAMA(),
        nestor.Unrolled(steps=2),
        nestor.Unrolled(steps=2, checkpoint="none"),
        nestor.ForwardUnrolled(),
        nestor.EvolutionStrategies(samples=1),
        nestor.Implicit(condition=nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian())),
    ],
    ids=lambda response: response.describe(),
)
@pytest.mark.parametrize("twice", [False, True])
def test_best_response(response: nestor.Response, twice: bool) -> None:
    """Every response, in a first and in a second derivative."""
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    theta = torch.tensor([2.0])
    optimizer = torch.optim.SGD([theta], lr=0.1)

    def derivative() -> Any:
        found = nestor.best_response(lambda t, a: ((t - a * b) ** 2).sum(), theta, a, response, optimizer=optimizer)
        return torch.autograd.grad(found.sum(), (a, b), allow_unused=True, create_graph=twice)

    with pytest.raises(nestor.UnsupportedError, match=r"'b' of shape \(\)"):
        derivative()


@pytest.mark.parametrize("kind", ["module", "tensor", "method", "object"])
def test_derivative_in_what_is_closed_over(kind: str) -> None:
    """A reverse pass for it alone does not reach the function: the call raises."""
    update, _ = closed_over(kind)
    with pytest.raises(nestor.UnsupportedError, match="not among its arguments"):
        nestor.fixed_point(update, torch.zeros(5, 3), torch.randn(5, 3, requires_grad=True))


def test_root() -> None:
    b = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(nestor.UnsupportedError, match="'b'"):
        nestor.root(lambda t, a: t - a * b, torch.tensor(2.0), torch.tensor(1.0, requires_grad=True))


def test_constants_are_allowed() -> None:
    """Constants; leaves that the function makes itself; leaves used without gradients; inputs that are read twice."""
    scale, held = torch.tensor(2.0), torch.tensor(3.0, requires_grad=True)

    def objective(t: Tensor, a: Tensor) -> Tensor:
        point = torch.ones(3).requires_grad_()
        (slope,) = torch.autograd.grad((point * t).pow(2).sum(), point, create_graph=True)  # 2 t^2
        with torch.no_grad():
            factor = held * 1.0
        return (slope.sum() / 6 - a * scale * factor * held.detach()).pow(2) / 4

    a = torch.tensor(0.5, requires_grad=True)
    theta = torch.tensor(3.0)  # t^2 = 18 a
    found = nestor.best_response(objective, theta, a, nestor.Implicit())
    torch.testing.assert_close(torch.autograd.grad(found, a)[0], torch.tensor(3.0))  # 9 / t


def test_hidden_in_another_function() -> None:
    """The function's own variables hold no tensor: the reverse pass raises, in a first and a second derivative."""
    b = torch.tensor(2.0, requires_grad=True)

    def product(a: Tensor) -> Tensor:
        return a * b

    for twice in (False, True):
        a = torch.tensor(1.0, requires_grad=True)
        found = nestor.best_response(lambda t, a: (t - product(a)) ** 2, torch.tensor(2.0), a, nestor.Implicit())
        with pytest.raises(nestor.UnsupportedError, match=r"a tensor of shape \(\)"):
            torch.autograd.grad(found, a, create_graph=twice)


def test_no_evaluation_more() -> None:
    """One forward and one gradient, as without the search; one forward where no reverse pass follows."""
    a = torch.tensor(1.0, requires_grad=True)
    with counting() as counts:
        found = nestor.best_response(lambda t, a: (t - a) ** 2, torch.tensor(1.0), a)
        found.backward()
    assert (counts.forwards["lower"], counts.gradients["lower"]) == (1, 1)
    with counting() as counts:
        nestor.fixed_point(lambda z, x: z / 2 + x, torch.tensor(2.0), torch.tensor(1.0))
    assert counts.forwards["root"] == 1


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "nested", "dual"])
def test_transforms(transform: str) -> None:
    """A tensor that a transform follows, read but no argument: never a silent zero."""
    x, w = torch.randn(3), torch.rand(3)

    def f(w: Tensor, x: Tensor = x) -> Tensor:
        return nestor.fixed_point(lambda z, x: torch.tanh(w * z) / 2 + x, x, x).sum()

    def dual() -> Any:
        with forward_ad.dual_level():
            return f(forward_ad.make_dual(w, w))

    calls: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(f)(w),
        "jvp": lambda: torch.func.jvp(f, (w,), (w,)),
        "vmap": lambda: torch.func.vmap(f)(torch.rand(2, 3)),
        "nested": lambda: torch.func.grad(lambda w: torch.func.grad(f, argnums=1)(w, x).sum())(w),
        "dual": dual,
    }
    with pytest.raises(nestor.UnsupportedError, match="'w'"):
        calls[transform]()


def test_hyperparameters_of_the_optimizer() -> None:
    """They would get no gradient: an error."""
    theta, a = torch.tensor([1.0]), torch.tensor(1.0, requires_grad=True)
    lr = torch.tensor(0.1, requires_grad=True)
    for optimizer in (torch.optim.SGD([theta], lr=lr), torch.optim.Adam([theta], betas=(lr, torch.tensor(0.9)))):
        with pytest.raises(nestor.UnsupportedError, match=r"lr|betas"):
            nestor.best_response(lambda t, a: (t - a).pow(2).sum(), theta, a, nestor.Unrolled(), optimizer=optimizer)


def test_a_layer_as_users_write_it() -> None:
    """A deep equilibrium layer that closes over its cell raises; one that passes the cell trains it."""

    class Layer(nn.Module):
        def __init__(self, *, passes_the_cell: bool) -> None:
            super().__init__()
            self.cell, self._passes = Cell(), passes_the_cell

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = iterate(self.cell, torch.zeros_like(x), x)
            return nestor.fixed_point(self.cell if self._passes else lambda z, x: self.cell(z, x), z, x)

    encoder, batch = nn.Linear(3, 3), torch.randn(5, 3)
    with pytest.raises(nestor.UnsupportedError, match=r"self\.cell\.linear\.weight"):
        Layer(passes_the_cell=False)(encoder(batch)).sum().backward()
    layer = Layer(passes_the_cell=True)
    layer(encoder(batch)).sum().backward()
    got = [p.grad for p in (*layer.cell.linear.parameters(), *encoder.parameters())]
    expected = torch.autograd.grad(
        iterate(layer.cell, torch.zeros(5, 3), encoder(batch)).sum(),
        [*layer.cell.linear.parameters(), *encoder.parameters()],
    )
    torch.testing.assert_close(got, list(expected), rtol=1e-7, atol=1e-9)
