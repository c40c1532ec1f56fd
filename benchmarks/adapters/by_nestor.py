"""This library, through its public names only."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from benchmarks.case import Case
from benchmarks.workloads.depth import Depth
from benchmarks.workloads.maml import MAML
from benchmarks.workloads.metagradient import Metagradient
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.reweighting import Reweighting
from benchmarks.workloads.unrolling import Unrolling


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
        batches = {"model": problem.train[0], "weighting": problem.validation[0]}
        return Case(engine.run, problem.quality, foreseen=lambda: _foreseen(program, batches))

    return build


def _foreseen(program: nestor.Program, batches: Any) -> int:
    memory = program.explain(batches).memory
    assert memory is not None
    return memory.peak


def _maml(checkpoint: str, **options: Any) -> Callable[[MAML], Case]:
    def build(problem: MAML) -> Case:
        fast = copy.deepcopy(problem.model)
        # Every episode is the same meta-batch, as in the other adapters.
        episodes = nestor.Episodes(itertools.repeat((problem.support, problem.query)), steps=problem.inner_steps)

        def fit(batch: Any, fast: nn.Module) -> Tensor:
            return problem.loss(fast(batch[0]), batch[1])

        program = nestor.Program(
            fast=nestor.Problem(
                fast,
                fit,
                data=episodes.support,
                optimizer=SGD(fast.parameters(), lr=problem.inner_lr),
                unroll_steps=problem.inner_steps,
                init="meta",
                tasks=problem.tasks,
                response=nestor.Unrolled(checkpoint=checkpoint),
            ),
            meta=nestor.Problem(
                problem.model,
                fit,
                data=episodes.query,
                optimizer=Adam(problem.model.parameters(), lr=problem.outer_lr),
            ),
        )
        engine = nestor.Engine(program, seed=0, **options)
        return Case(lambda times: engine.run(times * problem.inner_steps), problem.quality)

    return build


def _depth(nesting: str, make: Callable[[Depth], nestor.Response]) -> Callable[[Depth], Case]:
    def build(problem: Depth) -> Case:
        names = [f"level_{index}" for index in range(problem.depth)]
        response = make(problem)
        problems = {
            name: nestor.Problem(
                problem.levels[index],
                _depth_loss(problem, index, names),
                optimizer=SGD(problem.levels[index].parameters(), lr=problem.lr),
                response=response,
            )
            for index, name in enumerate(names)
        }
        program = nestor.Program(nesting=nesting, **problems)
        engine = nestor.Engine(program, seed=0)

        def evaluations() -> float:
            with nestor.diagnostics.count_evaluations(program) as counts:
                engine.run(1)
            return float(sum(counts.forwards.values()))

        return Case(engine.run, problem.quality, evaluations)

    return build


def _depth_loss(problem: Depth, index: int, names: list[str]) -> Callable[..., Tensor]:
    read = [names[i] for i in sorted([index, *problem.reads(index)])]

    def loss(**modules: nn.Module) -> Tensor:
        return problem.loss(index, {names.index(name): module for name, module in modules.items()})

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in read]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return loss


def _unrolling(checkpoint: str, **options: Any) -> Callable[[Unrolling], Case]:
    def build(problem: Unrolling) -> Case:
        weights = nestor.Variable(problem.weights.clone())

        def train_loss(model: nn.Module, weights: nn.Module) -> Tensor:
            return problem.train_loss(model, weights())

        def validation_loss(model: nn.Module) -> Tensor:
            return problem.validation_loss(model)

        program = nestor.Program(
            model=nestor.Problem(
                problem.model,
                train_loss,
                optimizer=Adam(problem.model.parameters(), lr=problem.lower_lr),
                unroll_steps=problem.steps,
                response=nestor.Unrolled(checkpoint=checkpoint),
            ),
            weights=nestor.Problem(weights, validation_loss, optimizer=SGD(weights.parameters(), lr=problem.upper_lr)),
        )
        engine = nestor.Engine(program, seed=0, **options)
        # What the compiler itself holds is not foreseen.
        foreseen = None if options.get("compile") else lambda: _foreseen(program, {})
        return Case(lambda times: engine.run(times * problem.steps), problem.quality, foreseen=foreseen)

    return build


def _metagradient(checkpoint: str, **options: Any) -> Callable[[Metagradient], Case]:
    def build(problem: Metagradient) -> Case:
        weights = nestor.Variable(problem.weights.clone())

        def train_loss(batch: Any, model: nn.Module, weights: nn.Module) -> Tensor:
            return problem.train_loss(model, weights(), batch)

        def validation_loss(model: nn.Module) -> Tensor:
            return problem.validation_loss(model)

        program = nestor.Program(
            model=nestor.Problem(
                problem.model,
                train_loss,
                data=problem.batches,
                optimizer=Adam(problem.model.parameters(), lr=problem.lower_lr),
                unroll_steps=problem.steps,
                response=nestor.Unrolled(checkpoint=checkpoint),
            ),
            weights=nestor.Problem(weights, validation_loss, optimizer=SGD(weights.parameters(), lr=problem.upper_lr)),
        )
        engine = nestor.Engine(program, seed=0, **options)
        return Case(lambda times: engine.run(times * problem.steps), problem.quality)

    return build


CASES = {
    "metagradient": {
        "every graph kept": _metagradient("none"),
        "default, small graphs kept": _metagradient("step"),
        "sqrt(T) states kept": _metagradient("sqrt"),
        "log(T) states kept": _metagradient("tree"),
        "sqrt(T) states kept, compiled": _metagradient("sqrt", compile=True),
    },
    "regression": {
        "exact": _regression(lambda _: nestor.T1T2()),
        "difference": _regression(lambda p: nestor.FiniteDifference(rel_step=p.rel_step)),
        "difference, reused": _regression(lambda p: nestor.FiniteDifference(rel_step=p.rel_step, reuse=True)),
        "conjugate gradient": _regression(_conjugate_gradient),
        "neumann": _regression(_neumann),
        "unrolled": _regression(lambda _: nestor.Unrolled()),
        "exact, compiled": _regression(lambda _: nestor.T1T2(), compile=True),
        "difference, compiled": _regression(lambda p: nestor.FiniteDifference(rel_step=p.rel_step), compile=True),
        "conjugate gradient, compiled": _regression(_conjugate_gradient, compile=True),
        "neumann, compiled": _regression(_neumann, compile=True),
    },
    "maml": {"vmap": _maml("none"), "vmap, compiled": _maml("step", compile=True)},
    "depth": {
        "frozen, difference": _depth("frozen", lambda p: nestor.FiniteDifference(rel_step=p.rel_step)),
        "frozen": _depth("frozen", lambda _: nestor.T1T2()),
        "exact": _depth("exact", lambda _: nestor.T1T2()),
    },
    "unrolling": {
        "every graph kept": _unrolling("none"),
        "default, small graphs kept": _unrolling("step"),
        "sqrt(T) states kept": _unrolling("sqrt"),
        "sqrt(T) states kept, compiled": _unrolling("sqrt", compile=True),
    },
    "reweighting": {
        "exact": _reweighting(lambda _: nestor.T1T2()),
        "exact, reused": _reweighting(lambda _: nestor.T1T2(reuse=True)),
        "difference": _reweighting(lambda p: nestor.FiniteDifference(rel_step=p.rel_step)),
        "difference, reused": _reweighting(lambda p: nestor.FiniteDifference(rel_step=p.rel_step, reuse=True)),
        "sama": _reweighting(lambda p: nestor.SAMA(rel_step=p.rel_step)),
    },
}
