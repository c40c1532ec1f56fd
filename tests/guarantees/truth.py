"""Hypergradients by plain torch: a loop of optimizer steps, and the formula of each response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

STEPS, RATE, MOMENTUM, UPPER_MOMENTUM, DAMPING = 3, 0.1, 0.5, 0.5, 5.0

Tensors = Sequence[Tensor]
Lower = Callable[[Tensors, Tensor, int], Tensor]
"""``loss(theta, w, step)``: the lower loss as a plain function."""
Upper = Callable[[Tensors], Tensor]
"""``loss(theta)``: the upper loss as a plain function."""
Rule = Callable[[list[Tensor], list[Tensor], Any], tuple[list[Tensor], Any]]
"""``rule(theta, gradients, memory) -> (theta, memory)``: one step; the first memory is None."""


def momentum(theta: list[Tensor], grads: list[Tensor], velocity: Any) -> tuple[list[Tensor], Any]:
    """SGD with momentum."""
    if velocity is not None:
        grads = [MOMENTUM * v + g for v, g in zip(velocity, grads, strict=True)]
    return [t - RATE * v for t, v in zip(theta, grads, strict=True)], grads


@dataclass(frozen=True)
class Truth:
    """Where a hypergradient is taken, and of what.

    Attributes:
        lower: The lower loss.
        upper: The upper loss.
        rule: The lower steps.
        start: The lower variables and the memory of the rule before the steps that the upper step looks back on.
        point: The lower variables after these steps.
        w: The upper variables.
        first: The number of the first of these steps.
        before: The lower variables before the last of these steps.
    """

    lower: Lower
    upper: Upper
    rule: Rule
    start: tuple[list[Tensor], Any]
    point: list[Tensor]
    w: Tensor
    first: int = 0
    before: Sequence[Tensor] = ()

    @property
    def last(self) -> int:
        return self.first + STEPS - 1

    def later(self) -> Truth:
        """What changes along the run has its value after the last step, or that during it: both are right."""
        return replace(self, lower=lambda theta, w, step: self.lower(theta, w, step + (step == self.last)))

    def trained(self, steps: int = STEPS, *, graph: bool = False) -> tuple[list[Tensor], Any]:
        """Take the steps; with ``graph``, differentiably in ``w``."""
        theta, memory = self.start
        theta = [t.detach().clone().requires_grad_() for t in theta]
        for step in range(self.first, self.first + steps):
            grads = torch.autograd.grad(
                self.lower(theta, self.w, step), theta, create_graph=graph, materialize_grads=True
            )
            theta, memory = self.rule(theta, list(grads), memory)
            if not graph:
                theta = [t.detach().requires_grad_() for t in theta]
        return theta, memory

    def cotangent(self) -> tuple[list[Tensor], list[Tensor]]:
        theta = [t.detach().clone().requires_grad_() for t in self.point]
        return theta, list(torch.autograd.grad(self.upper(theta), theta, materialize_grads=True))

    def mixed(self, theta: Tensors, vector: Tensors) -> Tensor:
        """Minus the mixed derivative times a vector, by double backward."""
        w = self.w.detach().clone().requires_grad_()
        grads = torch.autograd.grad(self.lower(theta, w, self.last), theta, create_graph=True, materialize_grads=True)
        return -torch.autograd.grad(grads, w, vector, allow_unused=True, materialize_grads=True)[0]

    def difference(self, theta: Tensors, vector: Tensors) -> Tensor:
        """The same by a central difference with the documented length."""
        eps = 1e-2 / torch.cat([v.reshape(-1) for v in vector]).norm()
        w = self.w.detach().clone().requires_grad_()
        sides = []
        for sign in (1, -1):
            moved = [(t + sign * eps * v).detach().requires_grad_() for t, v in zip(theta, vector, strict=True)]
            sides.append(torch.autograd.grad(self.lower(moved, w, self.last), w)[0])
        return -(sides[0] - sides[1]) / (2 * eps)


def unrolled(truth: Truth) -> Tensor:
    w = truth.w.detach().clone().requires_grad_()
    theta, _ = replace(truth, w=w).trained(graph=True)
    return torch.autograd.grad(truth.upper(theta), w, materialize_grads=True)[0]


def identity(truth: Truth) -> Tensor:
    return truth.mixed(*truth.cotangent())


def difference(truth: Truth) -> Tensor:
    return truth.difference(*truth.cotangent())


def before_last(truth: Truth) -> list[Tensor]:
    """The lower variables before the last step: those that the run had."""
    return [t.detach().clone().requires_grad_() for t in truth.before]


def reused(truth: Truth) -> Tensor:
    """The mixed derivative before the last step; the cotangent is that after it."""
    return truth.mixed(before_last(truth), truth.cotangent()[1])


def reused_difference(truth: Truth) -> Tensor:
    """The same by a forward difference with the documented length."""
    theta, vector = before_last(truth), truth.cotangent()[1]
    eps = 1e-2 / torch.cat([v.reshape(-1) for v in vector]).norm()
    w = truth.w.detach().clone().requires_grad_()
    moved = [(t + eps * v).detach().requires_grad_() for t, v in zip(theta, vector, strict=True)]
    there, here = (torch.autograd.grad(truth.lower(point, w, truth.last), w)[0] for point in (moved, theta))
    return -(there - here) / eps


def sama(truth: Truth) -> Tensor:
    """The vector is pulled back through the last step, as a function of its gradient."""
    theta, cotangent = truth.cotangent()
    before, memory = truth.trained(STEPS - 1)
    grads = torch.autograd.grad(truth.lower(before, truth.w, truth.last), before, materialize_grads=True)
    grads = [g.requires_grad_() for g in grads]
    after, _ = truth.rule([t.detach() for t in before], grads, memory)
    pulled = torch.autograd.grad(after, grads, cotangent)
    return truth.difference(theta, [-p for p in pulled])


def by_matrix(inverse: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Truth], Tensor]:
    def formula(truth: Truth) -> Tensor:
        point, cotangent = truth.cotangent()
        loss = truth.lower(point, truth.w, truth.last)
        grads = torch.autograd.grad(loss, point, create_graph=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, point, retain_graph=True, materialize_grads=True)])
            for f in flat
        ]
        solved = inverse(torch.stack(rows), torch.cat([c.reshape(-1) for c in cotangent]))
        pieces = solved.split([p.numel() for p in point])
        return truth.mixed(point, [s.reshape(p.shape) for s, p in zip(pieces, point, strict=True)])

    return formula


def damped(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).to(matrix), vector)


def series(matrix: Tensor, vector: Tensor) -> Tensor:
    term = total = 0.05 * vector
    for _ in range(4):
        term = term - 0.05 * matrix @ term
        total = total + term
    return total
