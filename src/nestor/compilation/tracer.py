"""The steps of some levels, written as a function of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.tracing import require_true
from nestor.compilation.batch import filled
from nestor.compilation.graph import Unsuitable
from nestor.compilation.graphs import emptied
from nestor.explain.memory import standing_in
from nestor.levels.gradient import Gradient, is_finite, present
from nestor.levels.level import Draw
from nestor.levels.moment import Moment, Record
from nestor.optim.rules import rule_of
from nestor.optim.state import State, Stored, keep
from nestor.optim.update import OptimizerUpdate, Update
from nestor.program import Program
from nestor.solvers import SolveState
from nestor.training.runner import Runner
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass
class Layout:
    """How to read the results of a graph.

    Attributes:
        slots: For each level and variable, what its update rule keeps after the step, without the tensors.
        metrics: For each level, the names of its metrics.
        stats: For each level, what the solves of levels below report.
    """

    slots: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, list[str]] = field(default_factory=dict)
    stats: dict[str, dict[str, list[str]]] = field(default_factory=dict)


class Tracer:
    """Takes the steps of some levels on tensors that stand for all that changes.

    Args:
        program: The program.
        runners: What changes in each level, by name.
        names: The levels, in the order in which they step; one may step several times.
        draws: For each level that is evaluated the batches of its steps, or those of its last one.
        given: For one level: which of its variables have a gradient. It is then given, and not computed.
    """

    def __init__(
        self,
        program: Program,
        runners: Mapping[str, Runner],
        names: Sequence[str],
        draws: Mapping[str, Sequence[tuple[Draw, ...]]],
        given: Sequence[bool] | None = None,
    ) -> None:
        self.program = program
        self.runners = runners
        self.names = names
        self.draws = draws
        self.given = given

    def write(self, *arguments: Tensor) -> tuple[list[Tensor], Layout]:
        """Take the steps.

        Args:
            arguments: The variables of all levels; for each level that steps the tensors that its rule keeps and its
                learning rates; the batches of the levels that are evaluated; if it is given, the gradient and the loss.

        Returns:
            For each level that steps its new variables, the tensors that its rule keeps, loss, norm of the gradient,
            metrics, and what the solves report; and how to read it all.
        """
        flat = iter(arguments)
        layout = Layout()
        tensors: dict[str, Sequence[Tensor]] = {
            name: [next(flat) for _ in level.parameters] for name, level in self.program.levels.items()
        }
        states: dict[str, list[dict[str, Any]]] = {}
        rules: dict[str, Update] = {}
        stepping = list(dict.fromkeys(self.names))
        for name in stepping:
            states[name] = [
                {key: next(flat) if isinstance(value, Tensor) else value for key, value in slot.items()}
                for slot in self.runners[name].kept()
            ]
            rules[name] = _rated(self.runners[name].level.rule(), flat)
        batches = {
            name: iter([tuple(_drawn(draw, flat) for draw in step) for step in steps])
            for name, steps in self.draws.items()
        }
        draws = {name: next(steps) for name, steps in batches.items() if name not in states}
        pasts = {name: _Past() for name in stepping if self.runners[name].recorder is not None}
        written: dict[str, list[Tensor]] = {}
        for name in self.names:
            program = standing_in(self.program, tensors)
            level = program.levels[name]
            draws[name] = next(batches[name])
            before = State([t.detach() for t in level.parameters], states[name])
            if name in pasts:
                pasts[name].note(Record(draws[name], rules[name]), before)
            solves: dict[str, SolveState] = {}
            if self.given is not None:
                values = [next(flat) if there else None for there in self.given]
                gradient = Gradient(next(flat), {}, values, algebra.norm(present(values)), {})
            else:
                moments = {below: Moment(draws[below]) for below in program.below(name)[:-1]}
                moments |= {below: pasts[below].moment(moment) for below, moment in moments.items() if below in pasts}
                moments[name] = Moment(draws[name])
                with torch.enable_grad():
                    gradient = program.gradient(level, moments, solves=solves)
            if any(solve.value or solve.memory for solve in solves.values()):
                raise Unsuitable("a response keeps something from one solve to the next")
            finite = is_finite(gradient)
            require_true(finite)
            after = rules[name].linked(before, gradient.values, {other: tensors[other] for other in level.depends})
            if finite.device.type != "cpu" and len(after.tensors()) == len(before.tensors()):
                # Nothing waits for the device: what must not be taken is undone there.
                pairs = zip(after.tensors(), before.tensors(), strict=True)
                after = after.replace([torch.where(finite, new, old) for new, old in pairs])
            for lower, past in pasts.items():
                if name in program.levels[lower].uppers:
                    past.uppers[name] = before.params
            tensors[name], states[name] = after.params, list(map(dict, after.slots))
            norm, metrics = gradient.norm, gradient.metrics
            written[name] = self._written(layout, name, after, gradient.loss, norm, metrics, solves)
        return [result for name in stepping for result in written[name]], layout

    def _written(
        self,
        layout: Layout,
        name: str,
        after: State,
        loss: Tensor,
        norm: Tensor,
        metrics: Mapping[str, Any],
        solves: Mapping[str, SolveState],
    ) -> list[Tensor]:
        kept, layout.slots[name] = emptied(after.slots)
        layout.metrics[name] = list(metrics)
        layout.stats[name] = {lower: list(solve.stats) for lower, solve in solves.items()}
        numbers = [*metrics.values(), *(value for solve in solves.values() for value in solve.stats.values())]
        return [*after.params, *kept, loss, norm, *(torch.as_tensor(number) for number in numbers)]


@dataclass
class _Past:
    """The steps of a level within a graph, for the levels above that look back on them."""

    records: list[Record] = field(default_factory=list)
    states: dict[int, Stored] = field(default_factory=dict)
    uppers: dict[str, Params] = field(default_factory=dict)

    def note(self, record: Record, before: State) -> None:
        # The compiler says what is kept and what is computed again.
        self.states[len(self.records)] = keep(before)
        self.records.append(record)

    def moment(self, present: Moment) -> Moment:
        return present._replace(records=self.records, states=self.states, uppers=self.uppers)


class Sender:
    """Differentiates the loss of a level whose responses are no graph, in its own variables and in those below.

    Args:
        program: The program.
        draws: The level's present draws.
        name: The level.
        below: The levels whose responses its loss reads.
    """

    def __init__(self, program: Program, draws: Sequence[Draw], name: str, below: Sequence[str]) -> None:
        self.program = program
        self.draws = draws
        self.name = name
        self.below = below

    def write(self, *arguments: Tensor) -> tuple[list[Tensor], tuple[list[str], list[bool]]]:
        """Differentiate.

        Args:
            arguments: The variables of all levels; the level's batches.

        Returns:
            The loss, the metrics, and the derivatives; the names of the metrics, and which derivatives there are.
        """
        flat = iter(arguments)
        tensors = {name: [next(flat) for _ in level.parameters] for name, level in self.program.levels.items()}
        program = standing_in(self.program, tensors)
        level = program.levels[self.name]
        draws = [_drawn(draw, flat) for draw in self.draws]
        held = dict(level.constants)
        wrt = [*level.parameters, *(t for name in self.below for t in program.levels[name].parameters)]
        with torch.enable_grad():
            loss, metrics, total = program.direct(level, draws, lambda draw: level.step_value(draw, held), wrt)
        require_true(torch.isfinite(loss))
        there = [value is not None for value in total]
        return [loss, *map(torch.as_tensor, metrics.values()), *present(total)], (list(metrics), there)


def _rated(rule: Update, flat: Iterator[Tensor]) -> Update:
    """Let the learning rates of a rule that is written out be arguments."""
    if not isinstance(rule, OptimizerUpdate) or rule_of(rule.optimizer, rule.groups) is None:
        return rule
    return replace(rule, groups=[{**group, "lr": next(flat)} for group in rule.groups])


def _drawn(draw: Draw, flat: Iterator[Tensor]) -> Draw:
    return Draw(filled(draw.batch, flat), draw.randomness)
