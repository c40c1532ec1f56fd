"""Plain PyTorch, written out: the floor of eager code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.optim import SGD, Adam

from benchmarks.adapters.solving import solve
from benchmarks.case import Case, repeated
from benchmarks.workloads.maml import MAML
from benchmarks.workloads.metagradient import Metagradient
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.reweighting import Reweighting
from benchmarks.workloads.unrolling import Unrolling


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
            solution = solve(problem, method, v, lambda u: torch.autograd.grad(g, w, u, retain_graph=True)[0])
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


def _maml_loop(problem: MAML) -> Case:
    parameters = dict(problem.model.named_parameters())
    outer = Adam(parameters.values(), lr=problem.outer_lr)

    def step() -> None:
        outer.zero_grad()
        total = torch.zeros(())
        for task in range(problem.tasks):
            fast = parameters
            for _ in range(problem.inner_steps):
                out = functional_call(problem.model, fast, (problem.support[0][task],))
                loss = problem.loss(out, problem.support[1][task])
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {k: p - problem.inner_lr * g for (k, p), g in zip(fast.items(), grads, strict=True)}
            out = functional_call(problem.model, fast, (problem.query[0][task],))
            total = total + problem.loss(out, problem.query[1][task])
        (total / problem.tasks).backward()
        outer.step()

    return repeated(step, problem.quality)


def _maml_vmap(problem: MAML, *, compiled: bool = False) -> Case:
    parameters = dict(problem.model.named_parameters())
    outer = Adam(parameters.values(), lr=problem.outer_lr)

    def loss(fast: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(functional_call(problem.model, fast, (x,)), y)

    def task(fast: dict[str, Tensor], xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(problem.inner_steps):
            grads = grad(loss)(fast, xs, ys)
            fast = {k: p - problem.inner_lr * grads[k] for k, p in fast.items()}
        return loss(fast, xq, yq)

    def mean(start: dict[str, Tensor]) -> Tensor:
        return vmap(task, in_dims=(None, 0, 0, 0, 0))(start, *problem.support, *problem.query).mean()

    hypergradient = torch.compile(grad(mean)) if compiled else grad(mean)

    def step() -> None:
        found = hypergradient({k: p.detach() for k, p in parameters.items()})
        for k, p in parameters.items():
            p.grad = found[k]
        outer.step()

    return repeated(step, problem.quality)


def _unrolling(problem: Unrolling) -> Case:
    weights = problem.weights.clone().requires_grad_()
    names = [name for name, _ in problem.model.named_parameters()]
    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def step() -> None:
        start = [p.detach().requires_grad_() for p in problem.model.parameters()]
        theta, first, second = start, [torch.zeros_like(p) for p in start], [torch.zeros_like(p) for p in start]
        for t in range(1, problem.steps + 1):
            fast = dict(zip(names, theta, strict=True))
            loss = problem.train_loss(lambda x, fast=fast: functional_call(problem.model, fast, (x,)), weights)
            grads = torch.autograd.grad(loss, theta, create_graph=True)
            first = [beta1 * m + (1 - beta1) * g for m, g in zip(first, grads, strict=True)]
            second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(second, grads, strict=True)]
            theta = [
                p - problem.lower_lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t) + 1e-24).sqrt() + eps)
                for p, m, v in zip(theta, first, second, strict=True)
            ]
        fast = dict(zip(names, theta, strict=True))
        upper = problem.validation_loss(lambda x: functional_call(problem.model, fast, (x,)))
        (found,) = torch.autograd.grad(upper, weights)
        with torch.no_grad():
            weights.sub_(problem.upper_lr * found)
            for p, new in zip(problem.model.parameters(), theta, strict=True):
                p.copy_(new)

    return repeated(step, problem.quality)


def _training(problem: Metagradient) -> Case:
    optimizer = Adam(problem.model.parameters(), lr=problem.lower_lr)

    def run() -> None:
        for batch in problem.batches:
            optimizer.zero_grad()
            problem.train_loss(problem.model, problem.weights, batch).backward()
            optimizer.step()

    return repeated(run, problem.quality)


CASES = {
    "metagradient": {"training": _training},
    "regression": {
        name: _regression(name) for name in ("exact", "difference", "conjugate gradient", "neumann", "unrolled")
    },
    "maml": {
        "loop": _maml_loop,
        "vmap": _maml_vmap,
        "vmap, compiled": lambda problem: _maml_vmap(problem, compiled=True),
    },
    "unrolling": {"graph of all steps": _unrolling},
    "reweighting": {name: _reweighting(name) for name in ("plain", "difference", "exact")},
}
