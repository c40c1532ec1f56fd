"""Batched cotangents, transforms of torch.func, forward mode: equal to the same problem solved with a graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.functional as autograd
from cells import Cell, iterate
from torch import Tensor, func, nn

import nestor
from nestor.autodiff.torch_features import PUBLIC_ONLY

Map = Callable[[Tensor], Tensor]
private = pytest.mark.skipif(PUBLIC_ONLY, reason="no public function takes a batch of cotangents apart")

N = 3


def problem(kind: str) -> tuple[Map, Map]:
    """The same function of ``x`` twice: attached by nestor, and with a graph through Newton's method.

    The gradient of ``t^T A t / 2 + sum t^4 / 40 - t^T sin x`` vanishes.
    """
    half = torch.randn(N, N)
    matrix = half @ half.T + torch.eye(N)

    def gradient(t: Tensor, x: Tensor) -> Tensor:
        return matrix @ t + 0.1 * t**3 - torch.sin(x)

    def solved(x: Tensor) -> Tensor:
        t = torch.zeros(N)
        for _ in range(12):
            t = t - torch.linalg.inv(matrix + (0.3 * t**2).diag_embed()) @ gradient(t, x)
        return t

    def attached(x: Tensor) -> Tensor:
        t = solved(x.detach()).detach()
        if kind == "root":
            return nestor.root(gradient, t, x, nestor.GMRES(rtol=1e-13))
        if kind == "fixed_point":
            return nestor.fixed_point(lambda t, x: t - 0.1 * gradient(t, x), t, x, nestor.DenseSolve())
        return nestor.best_response(
            lambda t, x: t @ matrix @ t / 2 + (t**4).sum() / 40 - t @ torch.sin(x),
            t,
            x,
            nestor.Implicit(solver=nestor.ConjugateGradient(rtol=1e-13)),
        )

    return attached, solved


@pytest.fixture(params=["root", "fixed_point", "best_response"])
def maps(request: pytest.FixtureRequest) -> tuple[Map, Map]:
    return problem(request.param)


def scalar(f: Map) -> Map:
    """A scalar that is no quadratic form of the best response."""
    return lambda x: f(x).pow(2).sum() + f(x).prod()


FIRST: dict[str, Callable[[Map, Tensor], Any]] = {
    "grad": lambda f, x: func.grad(scalar(f))(x),
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.arange(1.0, N + 1))[0],
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.arange(1.0, N + 1),)),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "vmap": lambda f, x: func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: func.vmap(func.grad(scalar(f)))(torch.stack([x, 2 * x])),
}
SECOND: dict[str, Callable[[Map, Tensor], Any]] = {
    "hessian": lambda f, x: func.hessian(scalar(f))(x),
    "jacrev of jacrev": lambda f, x: func.jacrev(func.jacrev(scalar(f)))(x),
    "jacfwd of jacfwd": lambda f, x: func.jacfwd(func.jacfwd(scalar(f)))(x),
    "jacrev of jacfwd": lambda f, x: func.jacrev(func.jacfwd(scalar(f)))(x),
}


@pytest.mark.parametrize("transform", [*FIRST, *SECOND])
def test_torch_func(maps: tuple[Map, Map], transform: str) -> None:
    attached, solved = maps
    x, call = torch.randn(N), {**FIRST, **SECOND}[transform]
    torch.testing.assert_close(call(attached, x), call(solved, x), rtol=1e-8, atol=1e-10)


def test_a_batch_of_hessians(maps: tuple[Map, Map]) -> None:
    """vmap over hessian, one row at a time."""
    rows = torch.randn(2, N)
    expected = torch.stack([func.hessian(scalar(maps[1]))(row) for row in rows])
    torch.testing.assert_close(func.vmap(func.hessian(scalar(maps[0])))(rows), expected, rtol=1e-8, atol=1e-10)


def test_reverse_pass_through_a_map(maps: tuple[Map, Map]) -> None:
    """The rows of a map are nodes of the ordinary graph."""
    attached, solved = maps
    rows = torch.randn(2, N, requires_grad=True)
    found, expected = (torch.autograd.grad(func.vmap(f)(rows).pow(2).sum(), rows) for f in (attached, solved))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_map_over_the_pullback(maps: tuple[Map, Map]) -> None:
    """A map over one node's pullback equals a loop."""
    x = torch.randn(N, requires_grad=True)
    z = maps[0](x)
    found = func.vmap(lambda c: torch.autograd.grad(z, x, c, retain_graph=True)[0])(torch.eye(N))
    loop = torch.stack([torch.autograd.grad(z, x, c, retain_graph=True)[0] for c in torch.eye(N)])
    torch.testing.assert_close(found, loop, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loop, func.jacrev(maps[1])(x.detach()), rtol=1e-8, atol=1e-10)


@private
def test_batched_cotangents(maps: tuple[Map, Map]) -> None:
    """``is_grads_batched=True`` equals a loop, in a first and a second derivative."""
    x = torch.randn(N, requires_grad=True)
    z = maps[0](x)
    (found,) = torch.autograd.grad(z, x, torch.eye(N), is_grads_batched=True, create_graph=True)
    loop = torch.stack([torch.autograd.grad(z, x, c, create_graph=True)[0] for c in torch.eye(N)])
    torch.testing.assert_close(found, loop, rtol=1e-10, atol=1e-12)
    second = [torch.autograd.grad(part.pow(2).sum(), x, retain_graph=True)[0] for part in (found, loop)]
    torch.testing.assert_close(second[0], second[1], rtol=1e-9, atol=1e-11)


@private
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_derivatives(maps: tuple[Map, Map], strategy: str) -> None:
    attached, solved = maps
    x = torch.randn(N)
    found = autograd.jacobian(attached, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(found, func.jacrev(solved)(x), rtol=1e-8, atol=1e-10)
    found = autograd.hessian(scalar(attached), x, vectorize=True, outer_jacobian_strategy=strategy)
    torch.testing.assert_close(found, func.hessian(scalar(solved))(x), rtol=1e-8, atol=1e-10)


def test_dual_numbers(maps: tuple[Map, Map]) -> None:
    """Forward mode, forward over reverse, and reverse over forward."""
    attached, solved = maps
    value, direction = torch.randn(N), torch.randn(N)

    def push(f: Map) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(value, direction))).tangent.clone()

    def over_reverse(f: Map) -> Tensor:
        x = value.clone().requires_grad_()
        with forward_ad.dual_level():
            (slope,) = torch.autograd.grad(scalar(f)(forward_ad.make_dual(x, direction)), x)
            return forward_ad.unpack_dual(slope).tangent.clone()

    def under_reverse(f: Map) -> Tensor:
        x = value.clone().requires_grad_()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(scalar(f)(forward_ad.make_dual(x, direction))).tangent
            return torch.autograd.grad(tangent, x)[0]

    torch.testing.assert_close(push(attached), push(solved), rtol=1e-8, atol=1e-10)
    expected = func.hessian(scalar(solved))(value) @ direction
    torch.testing.assert_close(over_reverse(attached), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(under_reverse(attached), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "response",
    [
        nestor.T1T2(),
        nestor.T1T2(cross=nestor.ForwardMode()),
        nestor.FiniteDifference(),
        nestor.Implicit(solver=nestor.Neumann(step_size=0.1, num_terms=3)),
        nestor.Unrolled(steps=3),
        nestor.Unrolled(steps=3, checkpoint="none"),
        nestor.ForwardUnrolled(),
        nestor.SAMA(),
    ],
    ids=lambda response: response.describe(),
)
def test_every_response(response: nestor.Response) -> None:
    """The Jacobian by every transform equals the one by ordinary reverse passes, exact or not."""
    start, direction = torch.randn(N), torch.randn(N)

    def f(x: Tensor) -> Tensor:
        theta = start.clone()
        optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
        return nestor.best_response(objective, theta, x, response, optimizer=optimizer)

    def objective(t: Tensor, x: Tensor) -> Tensor:
        return (t - x).pow(4).sum() / 4 + (t * x.sin()).sum()

    x = torch.randn(N)
    expected = autograd.jacobian(f, x)
    rtol = 1e-4 if "Finite" in response.describe() or "SAMA" in response.describe() else 1e-9
    torch.testing.assert_close(func.jacrev(f)(x), expected, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(func.jacfwd(f)(x), expected, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(func.jvp(f, (x,), (direction,))[1], expected @ direction, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(func.vmap(f)(torch.stack([x, x])), f(x).expand(2, N), rtol=1e-12, atol=1e-12)


def test_integers_in_a_map() -> None:
    """A map over labels: every row is solved with its own."""
    x, labels = torch.randn(4, N), torch.tensor([0, 2, 1, 0])

    def f(row: Tensor, label: Tensor) -> Tensor:
        return nestor.root(lambda t, given: t - given[0] * (given[1] + 1), row * (label + 1), (row, label))

    found = func.vmap(func.jacrev(f))(x, labels)
    torch.testing.assert_close(found, (labels + 1)[:, None, None] * torch.eye(N))


def test_a_module_under_functional_call() -> None:
    """The parameters that torch.func.functional_call puts into a module are those that it passes on."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, x: Tensor) -> Tensor:
            return nestor.fixed_point(self.cell, z, x, nestor.DenseSolve())

    layer, x = Layer(), torch.randn(N)
    z = iterate(layer.cell, torch.zeros(N), x)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = func.grad(lambda p: func.functional_call(layer, p, x).pow(2).sum())(parameters)
    own = dict(layer.cell.named_parameters())
    del own["frozen"]
    expected = torch.autograd.grad(iterate(layer.cell, torch.zeros(N), x).pow(2).sum(), list(own.values()))
    for name, value in zip(own, expected, strict=True):
        torch.testing.assert_close(found[f"cell.{name}"], value, rtol=1e-8, atol=1e-10)
