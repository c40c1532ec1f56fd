"""Betty (betty-ml 0.2.1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch.optim import SGD, Adam

import nestor
from benchmarks.case import Case
from benchmarks.workloads.depth import Depth
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.reweighting import Reweighting

logging.disable(logging.INFO)


def _engine(problems: list[Any], up_to_low: dict[Any, Any], low_to_up: dict[Any, Any]) -> Callable[[int], None]:
    """Return what takes so many steps of the lowest level."""
    engine = Engine(
        problems=problems,
        config=EngineConfig(train_iters=1, strategy="cpu"),
        dependencies={"u2l": up_to_low, "l2u": low_to_up},
    )
    engine.train()

    def run(times: int) -> None:
        for _ in range(times):
            engine.global_step += 1
            engine.train_step()

    return run


def _regression(method: str) -> Callable[[Regression], Case]:
    def build(problem: Regression) -> Case:
        class Upper(ImplicitProblem):
            def training_step(self, batch: Any) -> Any:
                return problem.validation_loss(self.lower.module(), batch)

        class Lower(ImplicitProblem):
            def training_step(self, batch: Any) -> Any:
                return problem.train_loss(self.module(), self.upper.module(), batch)

        w, d = nestor.Variable(problem.weights.clone()), nestor.Variable(problem.decay.clone())
        config = Config(
            type=method,
            unroll_steps=problem.unroll,
            first_order=True,
            darts_alpha=problem.rel_step,
            neumann_iterations=problem.terms,
            neumann_alpha=problem.series_step,
            cg_iterations=problem.terms,
            cg_alpha=1.0,
            sama_adam_alpha=problem.rel_step,
        )
        upper = Upper(
            "upper",
            Config(retain_graph=True),
            module=d,
            optimizer=Adam(d.parameters(), lr=problem.upper_lr),
            train_data_loader=[problem.validation],
        )
        lower = Lower(
            "lower",
            config,
            module=w,
            optimizer=SGD(w.parameters(), lr=problem.lower_lr),
            train_data_loader=[problem.train],
        )
        run = _engine([upper, lower], {upper: [lower]}, {lower: [upper]})
        return Case(lambda times: run(times * problem.unroll), lambda: problem.quality(lower.module()))

    return build


def _reweighting(method: str) -> Callable[[Reweighting], Case]:
    def build(problem: Reweighting) -> Case:
        class Upper(ImplicitProblem):
            def training_step(self, batch: Any) -> Any:
                return problem.validation_loss(self.lower.module, batch)

        class Lower(ImplicitProblem):
            def training_step(self, batch: Any) -> Any:
                return problem.train_loss(self.module, self.upper.module, batch)

        upper = Upper(
            "upper",
            Config(),
            module=problem.weighting,
            optimizer=Adam(problem.weighting.parameters(), lr=problem.upper_lr),
            train_data_loader=problem.validation,
        )
        lower = Lower(
            "lower",
            Config(type=method, unroll_steps=1, darts_alpha=problem.rel_step, sama_adam_alpha=problem.rel_step),
            module=problem.model,
            optimizer=problem.lower_optimizer(problem.model),
            train_data_loader=problem.train,
        )
        return Case(_engine([upper, lower], {upper: [lower]}, {lower: [upper]}), problem.quality)

    return build


def _depth(problem: Depth) -> Case:
    problems: list[Any] = []
    counted = 0

    def make(index: int) -> Any:
        class Level(ImplicitProblem):
            def training_step(self, batch: Any) -> Any:
                nonlocal counted
                counted += 1
                return problem.loss(index, {i: p.module for i, p in enumerate(problems)})

        module = problem.levels[index]
        return Level(
            f"level{index}",
            Config(type="darts", unroll_steps=1, darts_alpha=problem.rel_step, retain_graph=True),
            module=module,
            optimizer=SGD(module.parameters(), lr=problem.lr),
            train_data_loader=[(torch.zeros(1),)],
        )

    problems += [make(index) for index in range(problem.depth)]
    reads = {i: problem.reads(i) for i in range(problem.depth)}
    down = {p: [problems[j] for j in range(i) if j in reads[i]] for i, p in enumerate(problems) if i}
    up = {p: [problems[j] for j in reads[i] if j > i] for i, p in enumerate(problems[:-1])}
    run = _engine(problems, down, up)

    def evaluations() -> float:
        before = counted
        run(1)
        return float(counted - before)

    return Case(run, problem.quality, evaluations)


CASES = {
    "regression": {
        "difference": _regression("darts"),
        "conjugate gradient": _regression("cg"),
        "neumann": _regression("neumann"),
    },
    "reweighting": {"difference": _reweighting("darts"), "sama": _reweighting("sama")},
    "depth": {"finite differences along every path": _depth},
}
