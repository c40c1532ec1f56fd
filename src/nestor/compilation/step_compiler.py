"""Compiled graphs that replay recorded steps, and that pull cotangents back through them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.compilation.arguments import ArgumentCache, Arguments, Unsuitable, with_tensors, without_tensors
from nestor.compilation.constancy import check_constant
from nestor.compilation.graph import GraphCache, Traced
from nestor.errors import NestorWarning
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.optim.state import State
from nestor.optim.stepper import is_of_torch
from nestor.responses.unrolling.rule_step import Cotangents, Pulled
from nestor.responses.unrolling.step import Step, StepCompiler
from nestor.vectors import Params


class CompiledReplay(StepCompiler):
    """Replays the steps of one level by graphs: all steps share one graph for the step and one for its pullback.

    Args:
        level: The level.

    Attributes:
        reason: The reason why the steps are replayed eagerly; empty if they are compiled.
        is_paused: Whether the steps are replayed eagerly for now.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        self.reason = ""
        self.is_paused = False
        self._graphs = GraphCache()
        self._cache = ArgumentCache()

    def is_idle(self, step: Step) -> bool:
        return bool(self.reason) or self.is_paused or is_tracing() or step.record.update.is_learned

    def advance(self, step: Step, state: State, inputs: Params) -> State | None:
        def take(placed: Step, before: State, given: Params, _: Cotangents) -> Traced:
            gradient = placed.gradient(before, given)
            after = placed.record.update.differentiable_step(before, gradient, placed.read(given))
            tensors, layout = without_tensors(after.slots)
            return [*after.params, *tensors], layout

        found = self._run(take, step, state, inputs, ())
        if found is None:
            return None
        results, layout = iter(found[0]), found[1]
        params = [next(results) for _ in state.params]
        return State(params, with_tensors(layout, results))

    def pull_back(self, step: Step, state: State, inputs: Params, cotangents: Cotangents) -> Pulled | None:
        def pull(placed: Step, before: State, given: Params, cotangents: Cotangents) -> Traced:
            own, above = placed.vjp(before, given).pull_back(cotangents)
            present = [[v is not None for v in values] for values in (own, above)]
            return [v for v in (*own, *above) if v is not None], present

        found = self._run(pull, step, state, inputs, cotangents)
        if found is None:
            return None
        results = iter(found[0])
        own, above = ([next(results) if there else None for there in values] for values in found[1])
        return own, above

    def _run(
        self,
        function: Callable[[Step, State, Params, Cotangents], Traced],
        step: Step,
        state: State,
        inputs: Params,
        cotangents: Cotangents,
    ) -> tuple[Sequence[Tensor], Any] | None:
        rule = step.record.update
        if self.is_idle(step):
            return None
        # The inputs of a step differ among the levels above, and so do its constants: the graph depends on them.
        arguments = Arguments(self._cache, function.__name__, *step.layout.sizes)
        try:
            check_constant(self.level)
            held = arguments.add_noted(step.record.held)
            params = arguments.add_variables([p.contiguous() for p in state.params])
            given = arguments.add_variables([i.contiguous() for i in inputs])
            sent = arguments.add_vector(cotangents)
            update = arguments.add_update("rule", state.slots, rule.groups, rated=rule.is_written_out)
            batches = arguments.add_draws("draws", [step.record.draws])

            def trace(*tensors: Tensor) -> Traced:
                flat = iter(tensors)
                constants, point, above, vector = held(flat), params(flat), given(flat), sent(flat)
                slots, groups = update(flat)
                before = State(point, slots)
                [draws] = batches(flat)
                record = replace(step.record, update=rule.with_groups(groups), draws=draws, graph=None, held=constants)
                placed = replace(step, record=record, compiler=None)
                return function(placed, before, above, vector)

            graph = self._graphs.get(arguments, trace)
        except Unsuitable as error:
            self.reason = str(error)
            warnings.warn(
                f"Engine(compile=True): the steps of level {self.level.name!r} are replayed eagerly, because {error}.",
                NestorWarning,
                stacklevel=2,
            )
            return None
        with torch.no_grad():
            return graph(arguments.tensors), graph.layout


def with_compiled_replays(evaluator: Evaluator) -> Evaluator:
    """Return an evaluator whose responses replay the steps of levels without buffers by compiled graphs.

    A graph reads no attributes: the steps of optimizers that are not those of torch are replayed eagerly.
    """

    def has_attributes(level: Level) -> bool:
        optimizer = level.stepping.optimizer
        return optimizer is not None and not is_of_torch(optimizer)

    return evaluator.with_levels(
        {
            name: level
            if level.loss.buffers or has_attributes(level)
            else replace(level, stepping=replace(level.stepping, compiler=CompiledReplay(level)))
            for name, level in evaluator.levels.items()
        }
    )
