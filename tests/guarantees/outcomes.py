"""One cell of the table: a program runs, and its hypergradient is compared with an independent one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from columns import Column
from setups import Setup
from torch import Tensor
from truth import STEPS, UPPER_MOMENTUM, Truth

import nestor

Exchange = Callable[[Any], list[Any]]
"""Returns what all processes have given, in their order."""


def alone(value: Any) -> list[Any]:
    return [value]


def cell(make: Callable[[], Setup], column: Column, exchange: Exchange = alone) -> str:
    """Run one program and compare; processes that end differently are a defect."""
    setup = make()
    start = setup.variables()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = _Run(setup, column)
            failure = ""
        except (nestor.NestorError, ValueError) as error:
            is_named = "'net'" in str(error) or "'w'" in str(error)
            failure = f"error: {type(error).__name__}" if is_named else f"UNNAMED: {type(error).__name__}: {error}"
        except Exception as error:
            failure = f"RAW: {type(error).__name__}: {error}"
    told = any(isinstance(w.message, nestor.NestorWarning) for w in caught)
    outcomes = exchange((failure, list(setup.record)))
    failures = [failure for failure, _ in outcomes]
    if any(failures):
        return failures[0] if len(set(failures)) == 1 else f"DIFFERS between processes: {failures}"
    truth = found.truth(start, [record for _, record in outcomes])
    meant = (truth,) if column.at_start else (truth, truth.later())
    difference = min(_difference(found.hypergradient, column.formula(t)) for t in meant)
    if difference < 1e-6:
        return f"right{', warning' if told else ''} ({difference:.0e})"
    return "warning" if told else f"SILENT ({difference:.0e})"


class _BeforeLast(nestor.callbacks.Callback):
    """Notes the lower variables before the last step that an upper step looks back on."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.before = setup, list[Tensor]()

    def is_due(self, engine: Any, step: int) -> bool:
        return step % STEPS == STEPS - 1

    def on_step(self, engine: Any) -> None:
        if self.is_due(engine, engine.step):
            with engine.runtime.whole_modules():
                self.before = self.setup.variables()


class _Run:
    """A run until the hypergradient that is compared: of the first upper step, or of the second one if compiled."""

    def __init__(self, setup: Setup, column: Column) -> None:
        self.setup = setup
        program = setup.program(column.response(), STEPS)
        runtime = None if column.runtime is None else getattr(nestor, column.runtime)()
        noted = _BeforeLast(setup)
        callbacks = [*setup.callbacks, noted] if column.before_last else setup.callbacks
        engine = nestor.Engine(program, seed=0, callbacks=callbacks, compile=column.compile, runtime=runtime)
        self.w: list[Tensor] = []
        gradients: list[Tensor] = []
        memory: Tensor | float = 0.0
        for _ in range(2 if column.compile else 1):
            self.w.append(setup.weights.detach().clone())
            engine.run(STEPS)
            before, memory = memory, _momentum_of(engine)
            gradients.append(memory - UPPER_MOMENTUM * before)
        self.hypergradient = gradients[-1]
        self.before = noted.before
        self.point = setup.variables()

    def truth(self, start: list[Tensor], records: list[list[Any]]) -> Truth:
        lower, upper = self.setup.functions(records)
        truth = Truth(lower, upper, self.setup.rule, (start, None), self.point, self.w[0], before=self.before)
        for w in self.w[1:]:
            truth = replace(truth, start=truth.trained(), w=w, first=truth.first + STEPS)
        return truth


def _momentum_of(engine: nestor.Engine) -> Tensor:
    """Return the momentum of the upper level, which consists of its hypergradients."""
    level = engine.program.levels["w"]
    optimizer = level.problem.optimizer
    (held,) = optimizer.param_groups[0]["params"]
    (whole,) = level.gather([optimizer.state[held]["momentum_buffer"]])
    return whole.reshape(-1).clone()


def _difference(found: Tensor, expected: Tensor) -> float:
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
