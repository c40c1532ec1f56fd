"""Runs a grid of cells, one process a core; each is one line of JSON as soon as it has ended, and is not run again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import nestor
from shared import memory
from shared.experiment import ROOT

Outcome = dict[str, Any]
Run = Callable[["Cell", Path], Outcome]


@dataclass(frozen=True)
class Cell:
    """One training of a grid.

    Attributes:
        setting: Name of the data setting.
        guide: Number of guide images.
        unroll: Lower steps between two upper ones; 0 for plain training.
        method: Name of the method.
        rate: The rate that is searched.
        steps: Number of lower steps.
        seed: Seed of everything random.
    """

    setting: str
    guide: int
    unroll: int
    method: str
    rate: float
    steps: int
    seed: int

    def __str__(self) -> str:
        unroll = f"unroll {self.unroll}, " if self.unroll else ""
        return (
            f"{self.setting}, {self.method}, guide {self.guide}, {unroll}rate {self.rate:g}, {self.steps} steps, "
            f"seed {self.seed}"
        )


Found = Mapping[Cell, Outcome]


def cell_of(row: Mapping[str, Any]) -> tuple[Cell, Outcome]:
    """Split a row of JSON into the cell and what it reached."""
    names = {field.name for field in fields(Cell)}
    cell = Cell(**{name: value for name, value in row.items() if name in names})
    return cell, {name: value for name, value in row.items() if name not in names and name != "source"}


@dataclass(frozen=True)
class Results:
    """The cells that have ended.

    Attributes:
        lines: The file that a run appends to.
        page: The JSON file that the page is written from.
        source: Hash of the experiment's code; what another version has written does not count.
        config: Settings that all cells share.
    """

    lines: Path
    page: Path
    source: str
    config: Mapping[str, Any]

    def read(self) -> dict[Cell, Outcome]:
        """Return the cells of the present code, of the page's file and of the lines; an unfinished line is left out."""
        found: dict[Cell, Outcome] = {}
        if self.page.exists():
            page = json.loads(self.page.read_text(encoding="utf-8"))
            if page["source"] == self.source:
                found |= dict(map(cell_of, page["cells"]))
        for row in self._rows():
            if row["source"] == self.source:
                cell, outcome = cell_of(row)
                found[cell] = outcome
        return found

    def _rows(self) -> Iterator[dict[str, Any]]:
        for line in self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote
                continue

    def append(self, cell: Cell, outcome: Outcome) -> None:
        """Write a line at once; a line that was cut off before is closed first. Paths in errors are relative."""
        if "failure" in outcome:
            outcome = {**outcome, "failure": outcome["failure"].replace(f"{ROOT}/", "")}
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        text = self.lines.read_bytes() if self.lines.exists() else b""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write("" if not text or text.endswith(b"\n") else "\n")
            file.write(json.dumps({"source": self.source, **asdict(cell), **outcome}) + "\n")

    def publish(self) -> bool:
        """Write the page's file, a cell a line; return False if nothing has ended yet."""
        found = self.read()
        if not found:
            return False
        head = {"source": self.source, "config": dict(self.config), "versions": versions()}
        rows = sorted(json.dumps({**asdict(cell), **outcome}) for cell, outcome in found.items())
        text = json.dumps(head, indent=1)[:-2] + ',\n "cells": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"
        self.page.parent.mkdir(parents=True, exist_ok=True)
        self.page.write_text(text, encoding="utf-8")
        return True


def versions() -> dict[str, str]:
    """Return what the numbers depend on beside the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nestor": nestor.__version__,
        "processor": memory.processor(),
    }


def _one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def outcomes(cells: Sequence[Cell], run: Run, data: Path, processes: int) -> Iterator[tuple[Cell, Outcome]]:
    """Run cells, in this process or in several, and give what each reached as it ends."""
    if processes == 1:
        yield from ((cell, run(cell, data)) for cell in cells)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as executor:
        running = {executor.submit(run, cell, data): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def cost(cells: Iterable[Cell], found: Found) -> float:
    """Foresee the seconds of cells from the seconds of a step of the same method; 10 ms where none has ended."""
    known: dict[tuple[str, int], list[float]] = {}
    for cell, outcome in found.items():
        if "seconds" in outcome:
            known.setdefault((cell.method, cell.unroll), []).append(outcome["seconds"] / cell.steps)
    means = {key: sum(values) / len(values) for key, values in known.items()}
    return sum(cell.steps * means.get((cell.method, cell.unroll), 0.01) for cell in cells)


def run_grid(
    results: Results,
    blocks: Mapping[str, Callable[[Found], Sequence[Cell]]],
    run: Run,
    data: Path,
    processes: int,
    console: Console,
) -> int:
    """Run the cells of all blocks that are missing, block after block; return how many have failed.

    A block is a function of what has been found before it. Each cell prints a line with the time that is left.
    """
    failed = 0
    for name, block in blocks.items():
        found = results.read()
        cells = list(dict.fromkeys(block(found)))
        missing = [cell for cell in cells if cell not in found]
        console.print(f"{name}: {len(missing)} of {len(cells)} cells to run", highlight=False)
        waiting, begin = set(missing), perf_counter()
        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console)
        with bar:
            task = bar.add_task(name, total=len(missing))
            for cell, outcome in outcomes(missing, run, data, processes):
                results.append(cell, outcome)
                found[cell] = outcome
                waiting.discard(cell)
                failed += "failure" in outcome
                left = _time_left(missing, waiting, found, perf_counter() - begin)
                said = outcome.get("failure") or f"test {100 * outcome['test']:.1f} %"
                bar.console.print(f"{cell}: {said}; {left} left", highlight=False, markup=False, soft_wrap=True)
                bar.update(task, advance=1, description=f"{name}, {left} left")
    return failed


def _time_left(cells: Sequence[Cell], waiting: set[Cell], found: Found, passed: float) -> timedelta:
    done = cost([cell for cell in cells if cell not in waiting], found)
    return timedelta(seconds=round(passed * cost(waiting, found) / done) if done else 0)
