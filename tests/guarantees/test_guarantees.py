"""Every kind of program with every response ends right, or in a named error, or in a warning: never silently wrong.

The tables are ``docs/guarantees.md``. To write them anew: ``NESTOR_WRITE_GUARANTEES=1 python -m pytest
tests/guarantees``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from columns import COMPILED, RESPONSES, RUNTIMES, Column
from outcomes import cell
from rows import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
WRITES = os.environ.get("NESTOR_WRITE_GUARANTEES") == "1"
_INTRODUCTION = """# Guarantees

Kinds of programs (rows) and responses (columns). In each cell a program of two levels runs for three steps of its
lower optimizer, SGD with momentum if the row names no other, and one step of the upper level, in double precision. Its
hypergradient is compared with an independent one: the response's own formula by plain autograd on a plain model, or a
loop that is differentiated as a whole.

- **right** (relative difference from the independent hypergradient);
- **error**: the name of the exception; its message says what is wrong and what to write instead;
- **warning**: the run goes on after a `NestorWarning` that says what differs.

A test computes every cell again and fails if a cell is wrong without an error or a warning, or is not what this page
says (`tests/guarantees`, which also writes the page).
"""
_OTHER_ENGINES = """With `compile=True` the second upper step is compared, because the first one is eager; a warning
says why a level steps eagerly. The graphs are run as they are traced, without generated code (`tests/compilation` has
that). With `runtime=DataParallel()` and `FullySharded()` two processes share each batch, each draws its own random
numbers, and each uses the statistics of its own rows; the independent hypergradient is that of the mean over processes
of such losses, and both processes must end alike."""
TABLES: dict[str, tuple[str, Mapping[str, Column]]] = {
    "Responses, in one process": ("", RESPONSES),
    "Compiled steps, and two processes": (_OTHER_ENGINES, {**COMPILED, **RUNTIMES}),
}
_found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}


@cache
def processes() -> Callable[[], dict[str, dict[str, str]]]:
    """Start the two processes that compute the second table; return what waits for its cells."""
    folder = TemporaryDirectory()
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = subprocess.Popen(
        [*launcher, str(Path(__file__).parent / "processes.py"), folder.name],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def finish() -> dict[str, dict[str, str]]:
        with folder:
            output, _ = running.communicate(timeout=900)
            assert running.returncode == 0, output.decode()[-3000:]
            first, second = (json.loads((Path(folder.name) / f"{rank}.json").read_text()) for rank in range(2))
        return {kind: first[kind] | second[kind] for kind in first}

    return finish


@pytest.fixture(scope="module", autouse=True)
def page() -> Iterator[None]:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        processes()  # beside the cells of one process
    yield
    if not WRITES or any(len(row) < len(RESPONSES) + len(COMPILED) + len(RUNTIMES) for row in _found.values()):
        return
    text = _INTRODUCTION
    for heading, (introduction, columns) in TABLES.items():
        lines = [f"| kind | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        lines += [f"| {title(kind)} | {' | '.join(_found[kind][name] for name in columns)} |" for kind in KINDS]
        text += "\n".join(["", f"## {heading}", "", *([introduction, ""] if introduction else []), *lines, ""])
    PAGE.write_text(text, encoding="utf-8")


def documented() -> dict[str, dict[str, str]]:
    """Read the cells of the page, by kind and column."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        head, *cells = line.strip("| ").split(" | ")
        if head == "kind":
            columns = cells
        elif line.startswith("|") and not head.startswith("---"):
            found.setdefault(head, {}).update(zip(columns, cells, strict=True))
    return found


def title(kind: str) -> str:
    return (KINDS[kind].__doc__ or "").strip().rstrip(".")


def outcome(text: str) -> str:
    """What a cell says, without the figure."""
    return re.sub(r" \(.*\)", "", text)


def check(kind: str, row: dict[str, str]) -> None:
    _found[kind] |= row
    assert not {name: text for name, text in row.items() if not text.startswith(("right", "error", "warning"))}
    if not WRITES:
        expected = documented()[title(kind)]
        assert {name: outcome(text) for name, text in row.items()} == {name: outcome(expected[name]) for name in row}


@pytest.mark.parametrize("kind", KINDS)
def test_no_cell_is_silently_wrong(kind: str) -> None:
    row: dict[str, Any] = {}
    for name, column in RESPONSES.items():
        torch.manual_seed(0)
        row[name] = cell(KINDS[kind], column)
    check(kind, row)


@pytest.mark.distributed
def test_no_cell_of_other_engines_is_silently_wrong() -> None:
    """Compiled steps, and the runtimes of two processes."""
    cells = processes()()
    assert set(cells) == set(KINDS)
    for kind, row in cells.items():
        check(kind, row)
