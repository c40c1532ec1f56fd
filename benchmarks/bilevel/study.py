"""Tuning and measuring: every run goes into one JSON file, and what is there is not run again."""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nestor
from benchmarks.bilevel import by_nestor, published
from benchmarks.bilevel.problems import DataCleaning, Problem, Quadratics
from benchmarks.report import machine

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
POINTS = 20
# Evaluations of a block in which the speed of a method is measured.
BLOCK = 10_000

# Points of a run: evaluations, and the metric (None where it is not finite).
Curve = list[list[float | None]]


@dataclass(frozen=True)
class Study:
    """A problem, the grid of step sizes, and how long a run is.

    Attributes:
        title: For tables and pictures.
        metric: Name of the metric.
        build: Makes the problem.
        steps: Inner step sizes.
        outer_steps: Outer step sizes; a method is tuned over all pairs.
        evaluations: Derivatives of one sample in a run.
        goal: A value of the metric; tables give what it takes to reach it.
    """

    title: str
    metric: str
    build: Callable[[], Problem]
    steps: tuple[float, ...]
    outer_steps: tuple[float, ...]
    evaluations: int
    goal: float


STUDIES = {
    "quadratics": Study(
        "Quadratics",
        Quadratics.metric,
        cache(Quadratics),
        (0.03, 0.1, 0.3),
        (0.03, 0.1, 0.3),
        evaluations=200_000,
        goal=0.01,
    ),
    "cleaning": Study(
        "Data cleaning",
        DataCleaning.metric,
        cache(DataCleaning),
        (0.01, 0.03, 0.1),
        (10.0, 100.0, 1000.0),
        evaluations=200_000,
        goal=0.16,
    ),
}

METHODS = (*(f"nestor {name}" for name in by_nestor.METHODS), *published.METHODS)


def start(method: str, problem: Problem, step: float, outer_step: float, seed: int) -> Any:
    """Return a run of a method that has not begun."""
    if method.startswith("nestor "):
        return by_nestor.Solved(problem, by_nestor.METHODS[method.removeprefix("nestor ")], step, outer_step, seed)
    return published.METHODS[method](problem, step, outer_step, seed)


def marks(evaluations: int) -> list[int]:
    """Counts of evaluations at which the metric is measured, in geometric progression."""
    return [round(evaluations * 0.01 ** (1 - i / (POINTS - 1))) for i in range(POINTS)]


def run(study: Study, method: str, step: float, outer_step: float, seed: int, evaluations: int) -> Curve:
    """Return the curve of a run; one that diverges ends there."""
    problem = study.build()
    curve: Curve = [[0, problem.measure(*problem.start(seed))]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)
        solver = start(method, problem, step, outer_step, seed)
        for mark in marks(evaluations):
            try:
                solver.advance(mark)
            except nestor.NestorError:
                return [*curve, [mark, None]]
            value = problem.measure(solver.theta, solver.lam)
            if not math.isfinite(value):
                return [*curve, [mark, None]]
            curve.append([solver.evaluations, float(f"{value:.6g}")])
    return curve


def quality(curve: Curve) -> float:
    """Return the median metric of the last three points; infinite if the run diverged."""
    last = [metric for _, metric in curve[-3:]]
    return math.inf if None in last else statistics.median(last)  # type: ignore[type-var]


class Results:
    """The runs in a JSON file.

    Args:
        path: The file; it is read if it exists, and written after each run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.about: dict[str, Any] = content.get("about") or machine([], 1)
        self.speeds: dict[str, dict[str, float]] = content.get("seconds of an evaluation", {})
        self.curves: dict[str, Curve] = content.get("runs", {})

    def write(self) -> None:
        """Write the file at once, so that it is whole at any time."""
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(curve)}" for key, curve in self.curves.items())
        temporary = self.path.with_suffix(".part")
        head = f'{{"about": {json.dumps(self.about)},\n"seconds of an evaluation": {json.dumps(self.speeds)}'
        temporary.write_text(f'{head},\n"runs": {{\n{lines}\n}}}}\n', encoding="utf-8")
        temporary.replace(self.path)

    def ensure(self, name: str, method: str, step: float, outer_step: float, seed: int, evaluations: int) -> bool:
        """Run what the file does not hold; return whether it ran."""
        key = key_of(name, method, step, outer_step, seed)
        if key in self.curves:
            return False
        self.curves[key] = run(STUDIES[name], method, step, outer_step, seed, evaluations)
        self.write()
        return True

    def trials(self, name: str, method: str) -> dict[tuple[float, float], float]:
        """Return the quality on the tuning seed for each pair of step sizes that was run."""
        study = STUDIES[name]
        keys = {
            (step, outer): key_of(name, method, step, outer, TUNING_SEED)
            for step in study.steps
            for outer in study.outer_steps
        }
        return {pair: quality(self.curves[key]) for pair, key in keys.items() if key in self.curves}

    def tuned(self, name: str, method: str) -> tuple[float, float]:
        """Return the best pair of step sizes on the tuning seed."""
        trials = self.trials(name, method)
        return min(trials, key=trials.__getitem__)

    def reported(self, name: str, method: str) -> list[Curve]:
        """Return the curves of the reported seeds with the tuned step sizes."""
        if not self.trials(name, method):
            return []
        pair = self.tuned(name, method)
        keys = [key_of(name, method, *pair, seed) for seed in SEEDS]
        return [self.curves[key] for key in keys if key in self.curves]


def measure_speeds(study: Study, rounds: int) -> dict[str, float]:
    """Return the seconds of an evaluation of each method: medians over rounds in which all methods run in turn."""
    solvers = {method: start(method, study.build(), study.steps[0], study.outer_steps[0], 0) for method in METHODS}
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)
        for solver in solvers.values():
            solver.advance(4 * BLOCK // 10)
        for _ in range(rounds):
            for method, solver in solvers.items():
                before, begin = solver.evaluations, time.perf_counter()
                solver.advance(before + BLOCK)
                found[method].append((time.perf_counter() - begin) / (solver.evaluations - before))
    return {method: float(f"{statistics.median(times):.3g}") for method, times in found.items()}


def key_of(name: str, method: str, step: float, outer_step: float, seed: int) -> str:
    """Name a run."""
    return f"{name} | {method} | {step:g} | {outer_step:g} | {seed}"


def carry_out(results: Results, names: list[str], *, quick: bool) -> Iterator[str]:
    """Tune every method on one seed, then run it on the others; yield what was done.

    Args:
        results: Where the runs go.
        names: Studies.
        quick: One pair of step sizes, two seeds, and a hundredth of the evaluations: does it run?
    """
    for name in names:
        study = STUDIES[name]
        evaluations = study.evaluations // 100 if quick else study.evaluations
        pairs = [(step, outer) for step in study.steps for outer in study.outer_steps]
        for method in METHODS:
            for step, outer in pairs[4:5] if quick else pairs:
                if results.ensure(name, method, step, outer, TUNING_SEED, evaluations):
                    yield f"{name}: {method}, tuning {step:g}, {outer:g}"
            step, outer = results.tuned(name, method)
            for seed in SEEDS[:2] if quick else SEEDS:
                if results.ensure(name, method, step, outer, seed, evaluations):
                    yield f"{name}: {method}, seed {seed}"
        if name not in results.speeds:
            results.speeds[name] = measure_speeds(study, 1 if quick else 7)
            results.write()
            yield f"{name}: speeds"
