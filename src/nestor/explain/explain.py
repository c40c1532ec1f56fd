"""Tables and drawings of a program."""

from __future__ import annotations

import inspect
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nestor.autodiff.counters import Evaluations, counting
from nestor.autodiff.randomness import Captured
from nestor.explain.memory import Memory, forecast
from nestor.levels.level import Draw, Level
from nestor.levels.moment import Moment, ahead
from nestor.problem import Problem
from nestor.variable import Variable

if TYPE_CHECKING:
    from nestor.program import Program


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
    """What a program is and costs; print it, or read its ``rows`` and, if it was asked for, its ``memory``."""

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


def explain(program: Program, batches: Mapping[str, Any] | None = None) -> Explanation:
    """Tabulate a program, with its memory if ``batches`` are given.

    The cost is counted, not estimated: a miniature of the program, with one number a level, the same graph and the same
    responses, is run once.
    """
    miniature = _miniature(program)
    randomness = Captured.now()
    moments: dict[str, Moment] = {}
    for name, level in miniature.levels.items():
        draws = (Draw(None, randomness),) * level.problem.accumulate
        moments[name] = _taken(ahead(level, draws, dict(moments)), level, miniature, program.levels[name])
    rows = []
    for name, level in program.levels.items():
        with counting() as cost:
            miniature.gradient(miniature.levels[name], moments)
        above = [other for other in program.levels.values() if name in other.lowers]
        rows.append(
            Row(
                level=name,
                variables=len(level.parameters),
                elements=sum(p.numel() for p in level.parameters),
                reads=tuple(other for other in level.reads if other != name),
                lowers=level.lowers,
                uppers=level.uppers,
                response=level.response.describe() if above else "",
                cost=cost,
            )
        )
    return Explanation(program.nesting, tuple(rows), None if batches is None else forecast(program, batches))


def _taken(moment: Moment, level: Level, miniature: Program, real: Level) -> Moment:
    """Turn steps that lie ahead into steps that were taken, with the states that an engine would have kept."""
    recording = level.response.recording
    if not moment.records or recording is None:
        return moment
    count = min(len(moment.records), recording.window or len(moment.records))
    states = dict.fromkeys(range(0, count, recording.spacing or count), moment.states[0])
    gradients = [[torch.ones_like(p) for p in level.parameters]] if recording.gradient else []
    known = {other: [torch.ones(())] for other in level.uppers} if recording.inputs and not level.lowers else {}
    records = list(moment.records[:count])
    if recording.graph and not level.lowers and not real.all_buffers:
        theta = [p.detach().clone() for p in level.parameters]
        records = [
            replace(record, kept=miniature.gradient_with_graph(level, record.draws, theta)[1]) for record in records
        ]
    return moment._replace(
        records=records,
        states=states,
        ahead=False,
        gradients=gradients,
        input_gradients=known,
    )


class _MiniatureLoss:
    """A smooth loss that reads given levels, one number each."""

    def __init__(self, level: Level) -> None:
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in level.depends]
        )

    def __call__(self, **modules: nn.Module) -> Tensor:
        numbers = torch.stack([module() for module in modules.values()])
        return (numbers**2).sum() + 0.01 * (numbers.sum() + 1) ** 4


def _miniature(program: Program) -> Program:
    variables = {name: Variable(torch.tensor(0.5, dtype=torch.float64)) for name in program.levels}
    problems = {
        name: Problem(
            variables[name],
            _MiniatureLoss(level),
            optimizer=torch.optim.SGD(variables[name].parameters(), lr=0.01),
            unroll_steps=level.problem.unroll_steps,
            init=level.problem.init,
            tasks=level.problem.tasks,
            response=level.response.for_counting(sum(p.numel() for p in level.parameters)),
            accumulate=level.problem.accumulate,
        )
        for name, level in program.levels.items()
    }
    return type(program)(nesting=program.nesting, **problems)


def mermaid(program: Program) -> str:
    """Draw the graph: solid edges carry best responses upwards, dotted ones constrain levels below."""
    lines = ["flowchart BT"]
    labels: Mapping[str, str] = {
        name: f"{name}<br/>{sum(p.numel() for p in level.parameters):,} variables"
        for name, level in program.levels.items()
    }
    lines += [f'    {name}["{label}"]' for name, label in labels.items()]
    for name, level in program.levels.items():
        for other in level.reads:
            if program.levels[other].index < level.index:
                lines.append(f"    {other} -->|best response| {name}")
            elif program.levels[other].index > level.index:
                lines.append(f"    {other} -.->|constrains| {name}")
    return "\n".join(lines) + "\n"
