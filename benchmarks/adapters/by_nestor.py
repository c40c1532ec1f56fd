"""This library, through its public names only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from benchmarks.case import Case
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.reweighting import Reweighting


def _regression(make: Callable[[Regression], nestor.Response], **options: Any) -> Callable[[Regression], Case]:
    def build(problem: Regression) -> Case:
        def train_loss(batch: Any, weights: nn.Module, decay: nn.Module) -> Tensor:
            return problem.train_loss(weights(), decay(), batch)

        def validation_loss(batch: Any, weights: nn.Module) -> Tensor:
            return problem.validation_loss(weights(), batch)

        w, d = nestor.Variable(problem.weights.clone()), nestor.Variable(problem.decay.clone())
        program = nestor.Program(
            weights=nestor.Problem(
                w,
                train_loss,
                data=[problem.train],
                optimizer=SGD(w.parameters(), lr=problem.lower_lr),
                response=make(problem),
                unroll_steps=problem.unroll,
            ),
            decay=nestor.Problem(
                d, validation_loss, data=[problem.validation], optimizer=Adam(d.parameters(), lr=problem.upper_lr)
            ),
        )
        engine = nestor.Engine(program, seed=0, **options)
        return Case(lambda times: engine.run(times * problem.unroll), lambda: problem.quality(w()))

    return build


def _conjugate_gradient(problem: Regression) -> nestor.Response:
    return nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=problem.terms, rtol=0.0))


def _neumann(problem: Regression) -> nestor.Response:
    return nestor.Implicit(solver=nestor.Neumann(num_terms=problem.terms, step_size=problem.series_step))


def _reweighting(make: Callable[[Reweighting], nestor.Response], **options: Any) -> Callable[[Reweighting], Case]:
    def build(problem: Reweighting) -> Case:
        def train_loss(batch: Any, model: nn.Module, weighting: nn.Module) -> Tensor:
            return problem.train_loss(model, weighting, batch)

        def validation_loss(batch: Any, model: nn.Module) -> Tensor:
            return problem.validation_loss(model, batch)

        program = nestor.Program(
            model=nestor.Problem(
                problem.model,
                train_loss,
                data=problem.train,
                optimizer=problem.lower_optimizer(problem.model),
                response=make(problem),
            ),
            weighting=nestor.Problem(
                problem.weighting,
                validation_loss,
                data=problem.validation,
                optimizer=Adam(problem.weighting.parameters(), lr=problem.upper_lr),
            ),
        )
        engine = nestor.Engine(program, seed=0, **options)
        return Case(engine.run, problem.quality)

    return build


CASES = {
    "regression": {
        "exact": _regression(lambda _: nestor.T1T2()),
        "difference": _regression(lambda p: nestor.FiniteDifference(rel_step=p.rel_step)),
        "difference, reused": _regression(lambda p: nestor.FiniteDifference(rel_step=p.rel_step, reuse=True)),
        "conjugate gradient": _regression(_conjugate_gradient),
        "neumann": _regression(_neumann),
        "unrolled": _regression(lambda _: nestor.Unrolled()),
    },
    "reweighting": {
        "exact": _reweighting(lambda _: nestor.T1T2()),
        "difference": _reweighting(lambda p: nestor.FiniteDifference(rel_step=p.rel_step)),
        "difference, reused": _reweighting(lambda p: nestor.FiniteDifference(rel_step=p.rel_step, reuse=True)),
        "sama": _reweighting(lambda p: nestor.SAMA(rel_step=p.rel_step)),
    },
}
