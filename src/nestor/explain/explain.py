"""The table of a program: its levels, and what their updates cost."""

from __future__ import annotations

import inspect
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nestor.autodiff.instruments import Evaluations, counting
from nestor.data.draws import Captured, Draw
from nestor.explain.memory import Memory, forecast
from nestor.explain.taken import taken_steps
from nestor.levels.build import build
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.planning import planned_history
from nestor.optim.history import GradientGraph, LevelHistory
from nestor.problem import Problem
from nestor.variable import Variable
from nestor.vectors import algebra


@dataclass(frozen=True)
class Row:
    """One level of the table.

    Attributes:
        level: Its name.
        variables: Number of tensors it optimizes.
        elements: Number of their elements.
        reads: The levels its loss reads, itself left out.
        lowers: The levels whose best responses its objective contains.
        uppers: The levels above that its objective depends on.
        response: How the levels above differentiate through it; empty if none does.
        cost: Evaluations of one update of this level, by level; for an iterative solver the most it may take.
    """

    level: str
    variables: int
    elements: int
    reads: tuple[str, ...]
    lowers: tuple[str, ...]
    uppers: tuple[str, ...]
    response: str
    cost: Evaluations


@dataclass(frozen=True)
class Explanation:
    """What a program is and costs.

    Attributes:
        nesting: ``"exact"`` or ``"frozen"``.
        rows: One row a level, lowest first.
        memory: The memory of the updates, if batches were given.
    """

    nesting: str
    rows: tuple[Row, ...]
    memory: Memory | None = None

    def __rich__(self) -> Table:
        """Lay out the table, highest level first."""
        table = Table(title=f"Program, nesting={self.nesting!r}, highest level first", title_justify="left")
        for column in ("level", "variables", "reads", "lowers", "uppers", "response"):
            table.add_column(column, overflow="fold")
        for column in ("forwards", "gradients", "HVPs"):
            table.add_column(f"{column} / update", justify="right", overflow="fold")
        if self.memory is not None:
            table.add_column("memory of an update", justify="right")
            held, peak = self.memory.held / 2**20, self.memory.peak / 2**20
            table.caption = f"{held:,.1f} MiB stay from step to step, {peak:,.1f} MiB are held at the peak"
        for row in reversed(self.rows):
            memory = () if self.memory is None else (f"{self.memory.update[row.level] / 2**20:,.1f} MiB",)
            table.add_row(
                row.level,
                f"{row.elements:,} in {row.variables}",
                ", ".join(row.reads) or "-",
                ", ".join(row.lowers) or "-",
                ", ".join(row.uppers) or "-",
                row.response or "-",
                _sum(row.cost.forwards),
                _sum(row.cost.gradients),
                _sum(row.cost.hvps),
                *memory,
            )
        return table

    def __str__(self) -> str:
        """Render the table as text."""
        console = Console(file=io.StringIO(), width=160)
        console.print(self)
        text = console.file
        assert isinstance(text, io.StringIO)
        return text.getvalue()


def _sum(counts: Counter[str]) -> str:
    parts = [f"{name} {number}" for name, number in counts.items() if number]
    return "\n".join(parts) or "0"


def explain(evaluator: Evaluator, batches: Mapping[str, Any] | None = None) -> Explanation:
    """Tabulate a program, with its memory if ``batches`` are given.

    The cost is counted, not estimated: a miniature of the program, with one number a level, the same graph and the same
    responses, is run once.
    """
    miniature = _miniature(evaluator)
    randomness = Captured.now()
    histories: dict[str, LevelHistory] = {}
    for name, level in miniature.levels.items():
        draws = (Draw(None, randomness),) * level.problem.accumulate
        planned = planned_history(level, draws, dict(histories))
        histories[name] = _taken(planned, level, miniature, keeps_graphs=not evaluator.levels[name].loss.buffers)
    rows = []
    for name, level in evaluator.levels.items():
        with counting() as cost:
            miniature.gradient(miniature.levels[name], histories)
        above = [other for other in evaluator.levels.values() if name in other.lowers]
        rows.append(
            Row(
                level=name,
                variables=len(level.parameters),
                elements=algebra.size(level.parameters),
                reads=tuple(other for other in level.links.direct_reads if other != name),
                lowers=level.lowers,
                uppers=level.uppers,
                response=level.response.describe() if above else "",
                cost=cost,
            )
        )
    memory = None if batches is None else forecast(evaluator, batches)
    return Explanation(evaluator.nesting.name, tuple(rows), memory)


def _taken(planned: LevelHistory, level: Level, miniature: Evaluator, *, keeps_graphs: bool) -> LevelHistory:
    """Turn planned steps into the history that an engine would have built of them."""

    def graph() -> GradientGraph:
        return miniature.gradient_with_graph(level, planned.draws, level.copies())[1]

    spec = level.response.history_spec
    with_graphs = spec is not None and spec.graphs and keeps_graphs and not level.lowers
    builder = taken_steps(planned, level, graph=graph if with_graphs else None)
    if builder is None or spec is None:
        return planned
    above = {name: [torch.ones(())] for name in level.uppers}
    needs_inputs = spec.input_gradients and not level.lowers
    builder.took([torch.ones_like(p) for p in level.parameters], above if needs_inputs else {})
    return builder.build(planned.draws, slots=lambda: planned.states[0]().slots)


class _MiniatureLoss:
    """A smooth loss that reads given levels, one number each."""

    def __init__(self, level: Level) -> None:
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in level.links.dependencies]
        )

    def __call__(self, **modules: nn.Module) -> Tensor:
        numbers = torch.stack([module() for module in modules.values()])
        return (numbers**2).sum() + 0.01 * (numbers.sum() + 1) ** 4


def _miniature(evaluator: Evaluator) -> Evaluator:
    variables = {name: Variable(torch.tensor(0.5, dtype=torch.float64)) for name in evaluator.levels}
    levels = build(
        {
            name: Problem(
                variables[name],
                _MiniatureLoss(level),
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
