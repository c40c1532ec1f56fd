"""Compiled graphs that replay recorded steps, and that pull cotangents back through them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing
from nestor.compilation.arguments import ArgumentCache, Arguments, Unsuitable, with_tensors, without_tensors
from nestor.compilation.constancy import check_constant
from nestor.compilation.graph import CompiledGraph, GraphCache, Traced
from nestor.compilation.split_graph import SplitGraph, split_graph
from nestor.errors import NestorWarning
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.optim.state import State
from nestor.optim.stepper import is_of_torch
from nestor.responses.unrolling.rule_step import Cotangents, Pulled
from nestor.responses.unrolling.step import Step, StepCompiler, TakenStep
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
        self._graphs, self._split_graphs = GraphCache(), GraphCache()
        self._cache = ArgumentCache()
        self._creates: bool | None = None

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

    def vjp(self, step: Step, state: State, inputs: Params) -> tuple[TakenStep, int] | None:
        own = state.tensors()
        if len(own) == len(state.params) and self._makes_memory(step, state, inputs):
            return None  # the cotangents on the memory after the first step have no counterparts before it

        def take(placed: Step, before: State, given: Params, cotangents: Cotangents) -> Traced:
            taken = placed.vjp(before, given)
            after = taken.rule.differentiated
            pulled = taken.pull_back(cotangents)
            tensors, layout = without_tensors(after.slots)
            kept = [*after.params, *tensors]
            present = [[v is not None for v in values] for values in pulled]
            if len(after.tensors()) != len(own):
                raise Unsuitable("its rule makes memory after the first step")
            return [*kept, *(v for values in pulled for v in values if v is not None)], (len(kept), layout, present)

        def split(graph: Any, constants: Sequence[Tensor], examples: Sequence[Tensor], layout: Any) -> SplitGraph:
            return split_graph(graph, constants, examples, layout[0], len(own))

        # The cotangents are not known yet: these tensors have their shapes.
        found = self._find(take, step, state, inputs, own, self._split_graphs, split)
        if found is None:
            return None
        graph, arguments = found
        with torch.no_grad():
            results = graph(arguments)
        count, layout, present = graph.layout
        after = State(results[: len(state.params)], with_tensors(layout, iter(results[len(state.params) : count])))
        saved = results[count:]
        assert isinstance(graph.run, SplitGraph)
        taken = CompiledVJP(graph.run, arguments, saved, state, after, present)
        return taken, sum(t.numel() * t.element_size() for t in saved)

    def _makes_memory(self, step: Step, state: State, inputs: Params) -> bool:
        """Return whether a step of a rule without memory makes some."""
        if self._creates is None:
            zeros = [torch.zeros_like(p) for p in state.params]
            self._creates = len(step.finish(state, zeros, inputs).tensors()) > len(state.params)
        return self._creates

    def _run(
        self,
        function: Callable[[Step, State, Params, Cotangents], Traced],
        step: Step,
        state: State,
        inputs: Params,
        cotangents: Cotangents,
    ) -> tuple[Sequence[Tensor], Any] | None:
        found = self._find(function, step, state, inputs, cotangents, self._graphs, None)
        if found is None:
            return None
        graph, arguments = found
        with torch.no_grad():
            return graph(arguments), graph.layout

    def _find(
        self,
        function: Callable[[Step, State, Params, Cotangents], Traced],
        step: Step,
        state: State,
        inputs: Params,
        cotangents: Cotangents,
        graphs: GraphCache,
        compile: Callable[[Any, Sequence[Tensor], Sequence[Tensor], Any], Any] | None,
    ) -> tuple[CompiledGraph, list[Tensor]] | None:
        rule = step.record.update
        if self.reason or self.is_paused or is_tracing() or rule.is_learned:
            return None
        # The inputs of a step differ among the levels above, and so do its constants: the graph depends on them.
        arguments = Arguments(self._cache, function.__name__, *step.layout.sizes)
        try:
            check_constant(self.level)
            held = arguments.add_noted(step.record.held)
            params = arguments.add_variables([p.contiguous() for p in state.params])
            given = arguments.add_variables([i.contiguous() for i in inputs])
            update = arguments.add_update("rule", state.slots, rule.groups, rated=rule.is_written_out)
            batches = arguments.add_draws("draws", [step.record.draws])
            sent = arguments.add_vector(cotangents)

            def trace(*tensors: Tensor) -> Traced:
                flat = iter(tensors)
                constants, point, above = held(flat), params(flat), given(flat)
                slots, groups = update(flat)
                before = State(point, slots)
                [draws] = batches(flat)
                vector = sent(flat)
                record = replace(step.record, update=rule.with_groups(groups), draws=draws, graph=None, held=constants)
                placed = replace(step, record=record, compiler=None)
                return function(placed, before, above, vector)

            return graphs.get(arguments, trace, compile), arguments.tensors
        except Unsuitable as error:
            self.reason = str(error)
            warnings.warn(
                f"Engine(compile=True): the steps of level {self.level.name!r} are replayed eagerly, because {error}.",
                NestorWarning,
                stacklevel=2,
            )
            return None


@dataclass(frozen=True)
class CompiledVJP(TakenStep):
    """A step taken by a compiled graph, with the tensors that the graph of its pullback needs.

    Attributes:
        graph: Both graphs.
        arguments: The arguments of the step.
        saved: The tensors.
        before: The state before.
        after: The state after.
        present: Which cotangents on the state before, and on the inputs, the second graph returns; others are zero.
    """

    graph: SplitGraph
    arguments: Sequence[Tensor]
    saved: Sequence[Tensor]
    before: State
    after: State
    present: Sequence[Sequence[bool]]

    def differentiated(self) -> State:
        """Return the state after."""
        return self.after

    def state_after(self) -> State:
        """Return the state after."""
        return self.after

    def pull_back(self, cotangents: Cotangents, *, retain_graph: bool = False) -> Pulled:
        """Run the graph of the pullback."""
        own = self.before.tensors()
        padded = [*cotangents, *[None] * (len(own) - len(cotangents))]
        given = [torch.zeros_like(t) if c is None else c.contiguous() for c, t in zip(padded, own, strict=True)]
        with torch.no_grad():
            results = iter(self.graph.pull_back(self.arguments, self.saved, given))
        own_cotangents, above = ([next(results) if there else None for there in values] for values in self.present)
        return own_cotangents, above


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
