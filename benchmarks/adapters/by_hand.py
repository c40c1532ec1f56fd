"""Plain PyTorch, written out: the floor of eager code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from benchmarks.case import Case, repeated
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.reweighting import Reweighting


def _regression(method: str) -> Callable[[Regression], Case]:
    def build(problem: Regression) -> Case:
        w = problem.weights.clone().requires_grad_()
        decay = problem.decay.clone().requires_grad_()
        lower, upper = SGD([w], lr=problem.lower_lr), Adam([decay], lr=problem.upper_lr)

        def lower_steps() -> None:
            for _ in range(problem.unroll):
                w.grad = torch.autograd.grad(problem.train_loss(w, decay, problem.train), w)[0]
                lower.step()

        def difference() -> None:
            lower_steps()
            v = torch.autograd.grad(problem.validation_loss(w, problem.validation), w)[0]
            eps = problem.rel_step / v.norm()
            with torch.no_grad():
                kept = w.clone()
                w.add_(v * eps)
            plus = torch.autograd.grad(problem.train_loss(w, decay, problem.train), decay)[0]
            with torch.no_grad():
                w.sub_(2 * eps * v)
            minus = torch.autograd.grad(problem.train_loss(w, decay, problem.train), decay)[0]
            with torch.no_grad():
                w.copy_(kept)
            decay.grad = (minus - plus) / (2 * eps)
            upper.step()

        def implicit() -> None:
            lower_steps()
            v = torch.autograd.grad(problem.validation_loss(w, problem.validation), w)[0]
            g = torch.autograd.grad(problem.train_loss(w, decay, problem.train), w, create_graph=True)[0]
            solution = _solve(problem, method, v, g, w)
            decay.grad = -torch.autograd.grad(g, decay, solution)[0]
            upper.step()

        def unrolled() -> None:
            p = w.detach().requires_grad_()
            for _ in range(problem.unroll):
                g = torch.autograd.grad(problem.train_loss(p, decay, problem.train), p, create_graph=True)[0]
                p = p - problem.lower_lr * g
            decay.grad = torch.autograd.grad(problem.validation_loss(p, problem.validation), decay)[0]
            with torch.no_grad():
                w.copy_(p)
            upper.step()

        step = {"difference": difference, "unrolled": unrolled}.get(method, implicit)
        return repeated(step, lambda: problem.quality(w))

    return build


def _solve(problem: Regression, method: str, v: Tensor, g: Tensor, w: Tensor) -> Tensor:
    def product(u: Tensor) -> Tensor:
        return torch.autograd.grad(g, w, u, retain_graph=True)[0]

    if method == "exact":
        return v
    if method == "neumann":
        total = term = v
        for _ in range(problem.terms - 1):
            term = term - problem.series_step * product(term)
            total = total + term
        return problem.series_step * total
    x, r = torch.zeros_like(v), v
    p, rr = r, r @ r
    for _ in range(problem.terms):
        ap = product(p)
        a = rr / (ap @ p)
        x, r = x + a * p, r - a * ap
        new = r @ r
        p, rr = r + (new / rr) * p, new
    return x


def _reweighting(method: str) -> Callable[[Reweighting], Case]:
    def build(problem: Reweighting) -> Case:
        model, weighting = problem.model, problem.weighting
        theta, mu = list(model.parameters()), list(weighting.parameters())
        lower, upper = problem.lower_optimizer(model), Adam(mu, lr=problem.upper_lr)
        taken = 0

        def step() -> None:
            nonlocal taken
            batch = problem.train[taken % len(problem.train)]
            clean = problem.validation[taken % len(problem.validation)]
            taken += 1
            lower.zero_grad()
            problem.train_loss(model, weighting, batch).backward(inputs=theta)
            lower.step()
            if method == "plain":
                return
            v = torch.autograd.grad(problem.validation_loss(model, clean), theta)
            if method == "exact":
                g = torch.autograd.grad(problem.train_loss(model, weighting, batch), theta, create_graph=True)
                mixed = torch.autograd.grad(g, mu, v)
                for p, m in zip(mu, mixed, strict=True):
                    p.grad = -m
                upper.step()
                return
            eps = problem.rel_step / float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v))))
            with torch.no_grad():
                torch._foreach_add_(theta, v, alpha=eps)
            plus = torch.autograd.grad(problem.train_loss(model, weighting, batch), mu)
            with torch.no_grad():
                torch._foreach_add_(theta, v, alpha=-2 * eps)
            minus = torch.autograd.grad(problem.train_loss(model, weighting, batch), mu)
            with torch.no_grad():
                torch._foreach_add_(theta, v, alpha=eps)
            for p, a, b in zip(mu, minus, plus, strict=True):
                p.grad = (a - b).div_(2 * eps)
            upper.step()

        return repeated(step, problem.quality)

    return build


CASES = {
    "regression": {
        name: _regression(name) for name in ("exact", "difference", "conjugate gradient", "neumann", "unrolled")
    },
    "reweighting": {name: _reweighting(name) for name in ("plain", "difference", "exact")},
}
