"""TorchOpt (0.7.3): unrolled differentiation."""

from __future__ import annotations

import torch
import torchopt
from torch.optim import SGD, Adam

import nestor
from benchmarks.case import Case, repeated
from benchmarks.workloads.maml import MAML
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.unrolling import Unrolling


def _regression(problem: Regression) -> Case:
    module = nestor.Variable(problem.weights.clone())
    decay = problem.decay.clone().requires_grad_()
    upper, lower = Adam([decay], lr=problem.upper_lr), torchopt.MetaSGD(module, lr=problem.lower_lr)

    def step() -> None:
        upper.zero_grad()
        for _ in range(problem.unroll):
            lower.step(problem.train_loss(module(), decay, problem.train))
        problem.validation_loss(module(), problem.validation).backward()
        upper.step()
        torchopt.stop_gradient(module)
        torchopt.stop_gradient(lower)

    return repeated(step, lambda: problem.quality(module()))


def _maml(problem: MAML) -> Case:
    inner = torchopt.MetaSGD(problem.model, lr=problem.inner_lr)
    outer = Adam(problem.model.parameters(), lr=problem.outer_lr)

    def step() -> None:
        outer.zero_grad()
        model = torchopt.extract_state_dict(problem.model, by="reference", detach_buffers=True)
        optimizer = torchopt.extract_state_dict(inner, by="reference")
        losses = []
        for task in range(problem.tasks):
            for _ in range(problem.inner_steps):
                inner.step(problem.loss(problem.model(problem.support[0][task]), problem.support[1][task]))
            losses.append(problem.loss(problem.model(problem.query[0][task]), problem.query[1][task]))
            torchopt.recover_state_dict(problem.model, model)
            torchopt.recover_state_dict(inner, optimizer)
        torch.stack(losses).mean().backward()
        outer.step()

    return repeated(step, problem.quality)


def _unrolling(problem: Unrolling) -> Case:
    weights = problem.weights.clone().requires_grad_()
    lower = torchopt.MetaAdam(problem.model, lr=problem.lower_lr)
    upper = SGD([weights], lr=problem.upper_lr)

    def step() -> None:
        upper.zero_grad()
        for _ in range(problem.steps):
            lower.step(problem.train_loss(problem.model, weights))
        problem.validation_loss(problem.model).backward()
        upper.step()
        torchopt.stop_gradient(problem.model)
        torchopt.stop_gradient(lower)

    return repeated(step, problem.quality)


CASES = {
    "regression": {"unrolled": _regression},
    "maml": {"loop": _maml},
    "unrolling": {"graph of all steps": _unrolling},
}
