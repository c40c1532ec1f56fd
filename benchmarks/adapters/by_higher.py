"""higher (0.2.1): unrolled differentiation."""

from __future__ import annotations

import higher
import torch
from torch.optim import SGD, Adam

import nestor
from benchmarks.case import Case, repeated
from benchmarks.workloads.maml import MAML
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.reweighting import Reweighting
from benchmarks.workloads.unrolling import Unrolling


def _regression(problem: Regression) -> Case:
    module = nestor.Variable(problem.weights.clone())
    decay = problem.decay.clone().requires_grad_()
    lower, upper = SGD(module.parameters(), lr=problem.lower_lr), Adam([decay], lr=problem.upper_lr)

    def step() -> None:
        upper.zero_grad()
        with higher.innerloop_ctx(module, lower, copy_initial_weights=True) as (fast, optimizer):
            for _ in range(problem.unroll):
                optimizer.step(problem.train_loss(fast(), decay, problem.train))
            problem.validation_loss(fast(), problem.validation).backward()
            upper.step()
            with torch.no_grad():
                module().copy_(fast())

    return repeated(step, lambda: problem.quality(module()))


def _reweighting(problem: Reweighting) -> Case:
    model, weighting = problem.model, problem.weighting
    lower, upper = problem.lower_optimizer(model), Adam(weighting.parameters(), lr=problem.upper_lr)
    taken = 0

    def step() -> None:
        nonlocal taken
        batch = problem.train[taken % len(problem.train)]
        clean = problem.validation[taken % len(problem.validation)]
        taken += 1
        upper.zero_grad()
        with higher.innerloop_ctx(model, lower) as (fast, optimizer):
            optimizer.step(problem.train_loss(fast, weighting, batch))
            problem.validation_loss(fast, clean).backward()
        upper.step()
        lower.zero_grad()
        problem.train_loss(model, weighting, batch).backward()
        lower.step()

    return repeated(step, problem.quality)


def _maml(problem: MAML) -> Case:
    inner = SGD(problem.model.parameters(), lr=problem.inner_lr)
    outer = Adam(problem.model.parameters(), lr=problem.outer_lr)

    def step() -> None:
        outer.zero_grad()
        for task in range(problem.tasks):
            with higher.innerloop_ctx(problem.model, inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(problem.inner_steps):
                    optimizer.step(problem.loss(fast(problem.support[0][task]), problem.support[1][task]))
                loss = problem.loss(fast(problem.query[0][task]), problem.query[1][task])
                (loss / problem.tasks).backward()
        outer.step()

    return repeated(step, problem.quality)


def _unrolling(problem: Unrolling) -> Case:
    weights = problem.weights.clone().requires_grad_()
    lower = Adam(problem.model.parameters(), lr=problem.lower_lr)
    upper = SGD([weights], lr=problem.upper_lr)

    def step() -> None:
        upper.zero_grad()
        with higher.innerloop_ctx(problem.model, lower) as (fast, optimizer):
            for _ in range(problem.steps):
                optimizer.step(problem.train_loss(fast, weights))
            problem.validation_loss(fast).backward()
            with torch.no_grad():
                for p, new in zip(problem.model.parameters(), fast.parameters(), strict=True):
                    p.copy_(new)
        upper.step()

    return repeated(step, problem.quality)


CASES = {
    "regression": {"unrolled": _regression},
    "reweighting": {"one step unrolled": _reweighting},
    "maml": {"loop": _maml},
    "unrolling": {"graph of all steps": _unrolling},
}
