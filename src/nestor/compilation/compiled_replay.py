"""Steps of a trajectory, and their derivatives, as compiled graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nestor.compilation.batch import kind_of
from nestor.compilation.graph import Compiled, Unsuitable, compiled
from nestor.evaluations import Evaluations, add_to_active, counting
from nestor.optim.rules import rule_of
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, Update
from nestor.program import Program
from nestor.trajectory import Cotangents, Pulled, Step, StepGraphs
from nestor.tree import Params

MOST_GRAPHS = 16


@dataclass(frozen=True)
class _Graph:
    run: Compiled
    counts: Evaluations
    results: pytree.TreeSpec


class CompiledReplay(StepGraphs):
    """Replays the steps of one level by graphs: one for a step, one for its derivative, whatever their number.

    Args:
        name: The level.

    Attributes:
        reason: Why it is replayed eagerly; empty if it is not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reason = ""
        self._graphs: dict[Hashable, _Graph] = {}

    def advance(self, step: Step, state: State, inputs: Params) -> State | None:
        """Take the step."""

        def take(other: Step, before: State, given: Params, _: Any) -> Any:
            after = other.update.linked(before, other.gradient(before, given), other.named(given))
            return list(after.params), [dict(slot) for slot in after.slots]

        found = self._run("advance", take, step, state, inputs, ())
        return None if found is None else State(*found)

    def pull_back(self, step: Step, state: State, inputs: Params, cotangents: Cotangents) -> Pulled | None:
        """Map the cotangents back through the step."""

        def pull(other: Step, before: State, given: Params, sent: Cotangents) -> Any:
            return other.link(before, given).pull_back(sent)

        found = self._run("pull back", pull, step, state, inputs, cotangents)
        return None if found is None else (list(found[0]), list(found[1]))

    def _run(
        self,
        what: str,
        function: Callable[[Step, State, Params, Cotangents], Any],
        step: Step,
        state: State,
        inputs: Params,
        cotangents: Cotangents,
    ) -> Any:
        if self.reason or step.on is None:
            return None
        rule = step.update
        rates: list[Any] = []
        fields: list[Hashable] = []
        if isinstance(rule, OptimizerUpdate):
            if rule.learned:
                return None
            rated = rule_of(rule.optimizer, rule.groups) is not None
            for group in rule.groups:
                fields += [(k, v) for k, v in group.items() if not (rated and k == "lr")]
                rates += [torch.as_tensor(group["lr"], dtype=torch.float64)] if rated else []
        changing = (
            list(state.params),
            [dict(s) for s in state.slots],
            list(inputs),
            list(step.batches),
            rates,
            [*cotangents],
        )
        leaves, structure = pytree.tree_flatten(changing)
        key = (what, str(structure), *fields, *map(kind_of, leaves))
        arguments = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        graph = self._graphs.get(key) or self._compile(key, function, step, leaves, structure, arguments)
        if graph is None:
            return None
        add_to_active(graph.counts, 1)
        with torch.no_grad():
            found = iter(graph.run(*arguments))
        return pytree.tree_map(lambda kind: next(found) if kind is _TENSOR else kind, graph.results)

    def _compile(
        self,
        key: Hashable,
        function: Callable[[Step, State, Params, Cotangents], Any],
        step: Step,
        leaves: Sequence[Any],
        structure: pytree.TreeSpec,
        arguments: Sequence[Tensor],
    ) -> _Graph | None:
        results: list[Any] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            params, slots, inputs, batches, rates, sent = pytree.tree_unflatten(filled, structure)
            assert step.on is not None
            other = replace(step, lower=step.on(batches), update=_rated(step.update, rates), graphs=None)
            found = function(other, State(params, slots), inputs, sent)
            results.append(pytree.tree_map(lambda value: _TENSOR if isinstance(value, Tensor) else value, found))
            return [value.detach() for value in pytree.tree_leaves(found) if isinstance(value, Tensor)]

        try:
            if len(self._graphs) >= MOST_GRAPHS:
                raise Unsuitable(f"its batches have had {MOST_GRAPHS} different shapes; give them one (drop_last=True)")
            with counting() as counts:
                run = compiled(flat, arguments)
        except Unsuitable as error:
            self.reason = str(error)
            warnings.warn(
                f"Engine(compile=True): the steps of level {self.name!r} are replayed eagerly, because {error}.",
                stacklevel=2,
            )
            return None
        self._graphs[key] = _Graph(run, counts, results[0])
        return self._graphs[key]


class _Kind:
    pass


_TENSOR = _Kind()


def _rated(rule: Update, rates: Sequence[Tensor]) -> Update:
    if not isinstance(rule, OptimizerUpdate) or not rates:
        return rule
    groups = [{**group, "lr": rate} for group, rate in zip(rule.groups, rates, strict=True)]
    return replace(rule, groups=groups)


def with_graphs(program: Program) -> Program:
    """Return the program with levels whose steps are replayed by graphs."""
    levels = {
        name: level if level.all_buffers else replace(level, graphs=CompiledReplay(name))
        for name, level in program.levels.items()
    }
    return program.with_levels(levels)
