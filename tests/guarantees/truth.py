"""Hypergradients by plain torch: a loop of SGD with momentum, and the formula of each response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import nestor

STEPS, RATE, MOMENTUM, DAMPING = 3, 0.1, 0.5, 5.0

Lower = Callable[[Sequence[Tensor], Tensor, int], Tensor]
"""``loss(theta, w, step)``: the lower loss as a plain function."""
Upper = Callable[[Sequence[Tensor]], Tensor]
"""``loss(theta)``: the upper loss as a plain function."""


@dataclass(frozen=True)
class Method:
    """A response, and its own formula by plain autograd."""

    response: nestor.Response
    formula: Callable[[Lower, Upper, Sequence[Tensor], Tensor], Tensor]
    at_start: bool = False  # whether the formula is a function of the variables at the start, not at the end


def trained(lower: Lower, theta: Sequence[Tensor], w: Tensor, *, graph: bool = False) -> list[Tensor]:
    """Take the steps of SGD with momentum from ``theta``; with ``graph``, differentiably in ``w``."""
    theta = [t.detach().clone().requires_grad_() for t in theta]
    velocity = [torch.zeros_like(t) for t in theta]
    for step in range(STEPS):
        grads = torch.autograd.grad(lower(theta, w, step), theta, create_graph=graph, materialize_grads=True)
        velocity = [MOMENTUM * v + g for v, g in zip(velocity, grads, strict=True)]
        theta = [t - RATE * v for t, v in zip(theta, velocity, strict=True)]
        if not graph:
            theta = [t.detach().requires_grad_() for t in theta]
    return theta


def unrolled(lower: Lower, upper: Upper, theta: Sequence[Tensor], w: Tensor) -> Tensor:
    w = w.detach().clone().requires_grad_()
    return torch.autograd.grad(upper(trained(lower, theta, w, graph=True)), w, materialize_grads=True)[0]


def _cotangent(upper: Upper, theta: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    theta = [t.detach().clone().requires_grad_() for t in theta]
    return theta, list(torch.autograd.grad(upper(theta), theta, materialize_grads=True))


def _mixed(lower: Lower, theta: Sequence[Tensor], w: Tensor, vector: Sequence[Tensor]) -> Tensor:
    """Minus the mixed derivative times a vector, by double backward."""
    w = w.detach().clone().requires_grad_()
    grads = torch.autograd.grad(lower(theta, w, STEPS - 1), theta, create_graph=True, materialize_grads=True)
    return -torch.autograd.grad(grads, w, vector, allow_unused=True, materialize_grads=True)[0]


def _difference(lower: Lower, theta: Sequence[Tensor], w: Tensor, vector: Sequence[Tensor]) -> Tensor:
    """The same by a central difference with the documented length."""
    eps = 1e-2 / torch.cat([v.reshape(-1) for v in vector]).norm()
    w = w.detach().clone().requires_grad_()
    sides = []
    for sign in (1, -1):
        moved = [(t + sign * eps * v).detach().requires_grad_() for t, v in zip(theta, vector, strict=True)]
        sides.append(torch.autograd.grad(lower(moved, w, STEPS - 1), w)[0])
    return -(sides[0] - sides[1]) / (2 * eps)


def identity(lower: Lower, upper: Upper, theta: Sequence[Tensor], w: Tensor) -> Tensor:
    return _mixed(lower, *_with(_cotangent(upper, theta), w))


def difference(lower: Lower, upper: Upper, theta: Sequence[Tensor], w: Tensor) -> Tensor:
    return _difference(lower, *_with(_cotangent(upper, theta), w))


def sama(lower: Lower, upper: Upper, theta: Sequence[Tensor], w: Tensor) -> Tensor:
    """The step of SGD has the derivative ``-RATE`` in its gradient."""
    point, cotangent = _cotangent(upper, theta)
    return _difference(lower, point, w, [RATE * c for c in cotangent])


def _with(pair: tuple[list[Tensor], list[Tensor]], w: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    return pair[0], w, pair[1]


def _by_matrix(inverse: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def formula(lower: Lower, upper: Upper, theta: Sequence[Tensor], w: Tensor) -> Tensor:
        point, cotangent = _cotangent(upper, theta)
        grads = torch.autograd.grad(lower(point, w, STEPS - 1), point, create_graph=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, point, retain_graph=True, materialize_grads=True)])
            for f in flat
        ]
        solved = inverse(torch.stack(rows), torch.cat([c.reshape(-1) for c in cotangent]))
        pieces = solved.split([p.numel() for p in point])
        return _mixed(lower, point, w, [s.reshape(p.shape) for s, p in zip(pieces, point, strict=True)])

    return formula


def _damped(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).to(matrix), vector)


def _series(matrix: Tensor, vector: Tensor) -> Tensor:
    term = total = 0.05 * vector
    for _ in range(4):
        term = term - 0.05 * matrix @ term
        total = total + term
    return total


_solved = _by_matrix(_damped)
METHODS: dict[str, Method] = {
    "T1T2": Method(nestor.T1T2(), identity),
    "FiniteDifference": Method(nestor.FiniteDifference(), difference),
    "SAMA": Method(nestor.SAMA(), sama),
    "CG": Method(nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=300, rtol=1e-13), damping=DAMPING), _solved),
    "GMRES": Method(nestor.Implicit(solver=nestor.GMRES(max_steps=300, rtol=1e-13), damping=DAMPING), _solved),
    "Neumann": Method(nestor.Implicit(solver=nestor.Neumann(num_terms=5, step_size=0.05)), _by_matrix(_series)),
    "DenseSolve": Method(nestor.Implicit(solver=nestor.DenseSolve(), damping=DAMPING), _solved),
    "Unrolled, step": Method(nestor.Unrolled(), unrolled, True),
    "Unrolled, sqrt": Method(nestor.Unrolled(checkpoint="sqrt"), unrolled, True),
    "Unrolled, tree": Method(nestor.Unrolled(checkpoint="tree"), unrolled, True),
    "Unrolled, none": Method(nestor.Unrolled(checkpoint="none"), unrolled, True),
    "ForwardUnrolled": Method(nestor.ForwardUnrolled(), unrolled, True),
}
