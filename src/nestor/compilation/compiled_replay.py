"""Steps of a trajectory, and their derivatives, as compiled graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.tracing import is_tracing
from nestor.compilation.batch import Batches, filled
from nestor.compilation.graph import Unsuitable
from nestor.compilation.graphs import Graphs, Written, emptied, refilled
from nestor.optim.rules import rule_of
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate
from nestor.program import Program
from nestor.responses.unrolling.trajectory import Cotangents, Pulled, Step, StepGraphs
from nestor.vectors.algebra import Params


class CompiledReplay(StepGraphs):
    """Replays the steps of one level by graphs: one for a step, one for its derivative, whatever their number.

    Args:
        name: The level.

    Attributes:
        reason: Why it is replayed eagerly; empty if it is not.
        waits: Whether it is replayed eagerly for the time being.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reason = ""
        self.waits = False
        self._graphs = Graphs()
        self._batches = Batches()

    def advance(self, step: Step, state: State, inputs: Params) -> State | None:
        """Take the step."""

        def take(other: Step, before: State, given: Params, _: Cotangents) -> Written:
            after = other.update.linked(before, other.gradient(before, given), other.named(given))
            kept, slots = emptied(after.slots)
            return [*after.params, *kept], slots

        found = self._run(take, step, state, inputs, ())
        if found is None:
            return None
        results, layout = iter(found[0]), found[1]
        params = [next(results) for _ in state.params]
        return State(params, refilled(layout, results))

    def pull_back(self, step: Step, state: State, inputs: Params, cotangents: Cotangents) -> Pulled | None:
        """Map the cotangents back through the step."""

        def pull(other: Step, before: State, given: Params, sent: Cotangents) -> Written:
            own, above = other.link(before, given).pull_back(sent)
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
        function: Callable[[Step, State, Params, Cotangents], Written],
        step: Step,
        state: State,
        inputs: Params,
        cotangents: Cotangents,
    ) -> tuple[Sequence[Tensor], Any] | None:
        rule = step.update
        if (
            self.reason
            or self.waits
            or is_tracing()
            or step.on is None
            or (isinstance(rule, OptimizerUpdate) and rule.learned)
        ):
            return None
        # Of several levels above each sees the steps as a function of other inputs.
        key: list[Hashable] = [
            function.__name__,
            *step.named(inputs),
            len(cotangents),
            *(c is None for c in cotangents),
        ]
        dense = [*state.params, *inputs, *(c for c in cotangents if c is not None)]
        arguments = [tensor.contiguous() for tensor in dense]
        for slot in state.slots:
            for field, value in slot.items():
                key.append(field if isinstance(value, Tensor) else (field, value))
                if isinstance(value, Tensor):
                    arguments.append(value)
        groups: Sequence[Mapping[str, Any]] = ()
        if isinstance(rule, OptimizerUpdate):
            groups = rule.groups
            rated = rule_of(rule.optimizer, groups) is not None
            for group in groups:
                key += [v for k, v in group.items() if not (rated and k == "lr")]
                if rated:
                    arguments.append(torch.as_tensor(group["lr"], dtype=torch.float64))
            groups = groups if rated else ()
        try:
            for place, batch in enumerate(step.batches):
                tensors, kind = self._batches.flatten(place, batch)
                key.append(kind)
                arguments += tensors

            def write(*flat: Tensor) -> Written:
                rest = iter(flat)
                params, given = [next(rest) for _ in state.params], [next(rest) for _ in inputs]
                sent = [None if c is None else next(rest) for c in cotangents]
                slots = [{k: next(rest) if isinstance(v, Tensor) else v for k, v in s.items()} for s in state.slots]
                update = rule
                if isinstance(rule, OptimizerUpdate) and groups:
                    update = replace(rule, groups=[{**group, "lr": next(rest)} for group in groups])
                assert step.on is not None
                there = step.on([filled(batch, rest) for batch in step.batches])
                other = replace(step, lower=there, update=update, graphs=None)
                return function(other, State(params, slots), given, sent)

            graph = self._graphs.get(tuple(key), arguments, write)
        except Unsuitable as error:
            self.reason = str(error)
            warnings.warn(
                f"Engine(compile=True): the steps of level {self.name!r} are replayed eagerly, because {error}.",
                stacklevel=2,
            )
            return None
        with torch.no_grad():
            return graph(arguments), graph.layout


def with_graphs(program: Program) -> Program:
    """Return the program with levels whose steps are replayed by graphs."""
    levels = {
        name: level if level.all_buffers else replace(level, graphs=CompiledReplay(name))
        for name, level in program.levels.items()
    }
    return program.with_levels(levels)
