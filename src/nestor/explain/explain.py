"""The table of a program: its levels, and the cost of their updates."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor, nn

from nestor.autodiff.instruments import Evaluations, counting
from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.explain.display import COMPACT, Shown, broken
from nestor.explain.memory import Memory, forecast, taken_steps
from nestor.explain.seconds import measure
from nestor.explain.seconds import seconds as seconds_of
from nestor.levels.build import build
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.needed_history import needed_history
from nestor.levels.planning import planned_history
from nestor.optim.history import GradientGraph, LevelHistory
from nestor.problem import Problem
from nestor.responses.implicit.conditions import outputs
from nestor.variable import Variable
from nestor.vectors import algebra


@dataclass(frozen=True)
class Row:
    """One level of the table.

    Attributes:
        level: The name of the level.
        variables: Number of tensors that the level optimizes.
        elements: Number of elements of these tensors.
        reads: The other levels that the loss reads.
        lowers: The levels whose best responses the objective contains.
        uppers: The levels above on which the objective depends.
        peers: The levels that are neither above nor below.
        response: Description of the response by which the levels above differentiate; empty if there are none.
        cost: Evaluations of one update of this level, by level. An iterative solver counts with its maximum number of
            steps.
        seconds: The time of one update, from measured evaluations, without the optimizer's own step; None if it was
            not asked for.
    """

    level: str
    variables: int
    elements: int
    reads: tuple[str, ...]
    lowers: tuple[str, ...]
    uppers: tuple[str, ...]
    peers: tuple[str, ...]
    response: str
    cost: Evaluations
    seconds: float | None = None


@dataclass(frozen=True)
class Explanation(Shown):
    """The levels of a program, the cost of their updates and the memory. It prints as a table.

    Attributes:
        nesting: ``"exact"`` or ``"frozen"``.
        rows: One row per level, lowest first.
        memory: The memory of the updates; None if no batches were given.
    """

    nesting: str
    rows: tuple[Row, ...]
    memory: Memory | None = None

    def __rich__(self) -> Table:
        has_peers = any(row.peers for row in self.rows)
        names = ("level", "variables", "lowers", "uppers", *["peers"] * has_peers, "response")
        columns = [Column(name, overflow="fold") for name in names]
        columns += [Column(kind, justify="right", no_wrap=True) for kind in ("forwards", "gradients", "HVPs")]
        title = f"Program, nesting={self.nesting!r}, highest level first. Per update of a level: evaluations"
        title += "" if self.memory is None else ", memory"
        title += ", time" if any(row.seconds is not None for row in self.rows) else ""
        table = Table(*columns, title=title, title_justify="left", caption_justify="left", **COMPACT)
        if self.memory is not None:
            table.add_column("MiB", justify="right")
            held, peak = self.memory.held / 2**20, self.memory.peak / 2**20
            table.caption = f"{held:,.1f} MiB stay from step to step, {peak:,.1f} MiB are held at the peak."
        is_timed = any(row.seconds is not None for row in self.rows)
        if is_timed:
            table.add_column("ms", justify="right")
        for row in reversed(self.rows):
            time = (f"{1e3 * row.seconds:,.3g}",) if row.seconds is not None else ()
            linked = (row.lowers, row.uppers, *[row.peers] * has_peers)
            edges = (", ".join(levels) or "-" for levels in linked)
            costs = map(_lines, (row.cost.forwards, row.cost.gradients, row.cost.hvps))
            memory = () if self.memory is None else (f"{self.memory.update[row.level] / 2**20:,.1f}",)
            size = f"{row.elements:,} in {row.variables}"
            mixed = "" if self.memory is None else self.memory.mixed.get(row.level, "")
            response = broken(row.response) + (f",\nmixed derivative by\n{mixed}" if row.response and mixed else "")
            response += ",\ngraphs of steps kept" if self.memory is not None and row.level in self.memory.graphs else ""
            table.add_row(row.level, size, *edges, response or "-", *costs, *memory, *time)
        return table


def _lines(counts: Counter[str]) -> str:
    return "\n".join(f"{name} {number}" for name, number in counts.items() if number) or "0"


def explain(evaluator: Evaluator, batches: Mapping[str, Any] | None = None, *, seconds: bool = False) -> Explanation:
    """Tabulate a program, with its memory if ``batches`` are given.

    The cost is counted, not estimated: the function runs a miniature of the program once. The miniature has one number
    per level, the same graph and the same responses. Graphs of steps that are kept only if they are small are
    counted as kept if ``batches`` show that they are small; without batches, their steps are evaluated again.

    Args:
        evaluator: Evaluates the losses of the program.
        batches: One batch for each level that takes one, by level name; None omits the memory.
        seconds: Whether the losses are evaluated on the batches, to say the time of an update too.
    """
    if seconds and batches is None:
        raise ValueError("explain(seconds=True) evaluates the losses: it needs batches.")
    memory = None if batches is None else forecast(evaluator, batches)
    small = () if memory is None else memory.graphs
    miniature = _miniature(evaluator)
    randomness = Captured.now()
    histories: dict[str, LevelHistory] = {}
    for name, level in miniature.levels.items():
        draws = (Draw(None, randomness),) * level.problem.accumulate
        planned = planned_history(level, draws, dict(histories))
        own = needed_history(evaluator.levels[name])
        with_graphs = own is not None and (name in small if own.graphs is None else own.graphs)
        histories[name] = _taken(planned, level, miniature, with_graphs=with_graphs)
    rows = []
    for name, level in evaluator.levels.items():
        with counting() as cost:
            miniature.gradient(miniature.levels[name], histories)
        is_lower = any(name in other.lowers for other in evaluator.levels.values())
        reads = tuple(other for other in level.links.direct_reads if other != name)
        sizes = len(level.parameters), algebra.size(level.parameters)
        response = level.response.describe() if is_lower else ""
        rows.append(Row(name, *sizes, reads, level.lowers, level.uppers, level.peers, response, cost))
    if seconds and batches is not None:
        times = measure(evaluator, batches, twice=any(row.cost.hvps for row in rows))
        rows = [replace(row, seconds=seconds_of(row.cost, times)) for row in rows]
    return Explanation(evaluator.nesting.name, tuple(rows), memory)


def _taken(planned: LevelHistory, level: Level, miniature: Evaluator, *, with_graphs: bool) -> LevelHistory:
    """Turn planned steps into the history that an engine would have built."""

    def graph() -> GradientGraph:
        return miniature.gradient_with_graph(level, planned.draws, level.copies())[1]

    spec = needed_history(level)
    builder = taken_steps(planned, level, graph=graph if with_graphs and not level.lowers else None)
    if builder is None or spec is None:
        return planned
    above = {name: [torch.ones(())] for name in level.uppers}
    needs_inputs = spec.input_gradients and not level.lowers
    builder.took([torch.ones_like(p) for p in level.parameters], above if needs_inputs else {})
    return builder.build(planned.draws, slots=lambda: planned.states[0]().slots)


def _miniature_loss(level: Level) -> Callable[..., Tensor]:
    """Return a smooth loss that reads the same levels as the loss of ``level``, one number each."""

    def loss(**modules: nn.Module) -> Tensor:
        numbers = outputs(torch.stack([module() for module in modules.values()]))  # marked for GaussNewton
        return (numbers**2).sum() + 0.01 * (numbers.sum() + 1) ** 4

    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in level.links.dependencies]
    vars(loss)["__signature__"] = inspect.Signature(names)
    return loss


def _miniature(evaluator: Evaluator) -> Evaluator:
    variables = {name: Variable(torch.tensor(0.5, dtype=torch.float64)) for name in evaluator.levels}
    levels = build(
        {
            name: Problem(
                variables[name],
                _miniature_loss(level),
                optimizer=torch.optim.SGD(variables[name].parameters(), lr=0.01),
                unroll_steps=level.problem.unroll_steps,
                init=level.problem.init,
                tasks=level.problem.tasks,
                response=level.response.for_counting(algebra.size(level.parameters)),
                accumulate=level.problem.accumulate,
            )
            for name, level in evaluator.levels.items()
        }
    )
    return Evaluator(levels, type(evaluator.nesting)(levels))
