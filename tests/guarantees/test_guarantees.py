"""Every kind of program with every response ends right, or in a named error, or in a warning: never silently wrong.

The table is ``docs/guarantees.md``. To write it anew: ``NESTOR_WRITE_GUARANTEES=1 python -m pytest tests/guarantees``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kinds import KINDS
from torch import Tensor
from truth import METHODS, STEPS, Lower, Method

import nestor

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
_INTRODUCTION = """# Guarantees

Kinds of programs (rows) and responses (columns). In each cell a program of two levels runs for three steps of SGD with
momentum and one step of the upper level, in double precision, and its hypergradient is compared with an independent
one: the response's own formula by plain autograd on a plain model, or a loop that is differentiated as a whole.

- **right** (relative difference from the independent hypergradient);
- **error**: the name of the exception; its message says what is wrong and what to write instead;
- **warning**: the run goes on after a `NestorWarning` that says what differs.

A test computes every cell again and fails if a cell is wrong without an error or a warning, or is not what this page
says (`tests/guarantees`, which also writes the page).

"""


def cell(kind: str, method: Method) -> str:
    """Run one program and compare."""
    setup = KINDS[kind]()
    lower, upper, start = setup.functions()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            program, noting = setup.program(method.response, STEPS)
            nestor.Engine(program, seed=0, callbacks=setup.callbacks).run(STEPS)
        except (nestor.NestorError, ValueError) as error:
            is_named = "'net'" in str(error) or "'w'" in str(error)
            return f"error: {type(error).__name__}" if is_named else f"UNNAMED: {error}"
    (w,) = program.levels["w"].parameters
    point = start if method.at_start else [p.detach() for p in setup.net.parameters() if p.requires_grad]
    meant = (lower,) if method.at_start else (lower, _later(lower))
    difference = min(_difference(noting.noted, method.formula(f, upper, point, w)) for f in meant)
    told = any(isinstance(w.message, nestor.NestorWarning) for w in caught)
    if difference < 1e-6:
        return f"right{', warning' if told else ''} ({difference:.0e})"
    return "warning" if told else f"SILENT ({difference:.0e})"


def _difference(found: Tensor, expected: Tensor) -> float:
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def _later(lower: Lower) -> Lower:
    """What changes along the run has its value after the last step, or that during it: both are right."""
    return lambda theta, w, step: lower(theta, w, step + (step == STEPS - 1))


def documented() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (?!kind|---)(.+?) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {title: [cell.strip() for cell in cells.split(" | ")] for title, cells in rows}


def title(kind: str) -> str:
    return (KINDS[kind].__doc__ or "").strip().rstrip(".")


def outcome(text: str) -> str:
    """What a cell says, without the figure."""
    return re.sub(r" \(.*\)", "", text)


_rows: dict[str, list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def page() -> Iterator[None]:
    yield
    if os.environ.get("NESTOR_WRITE_GUARANTEES") != "1" or len(_rows) != len(KINDS):
        return
    lines = [f"| kind | {' | '.join(METHODS)} |", "| --- " * (len(METHODS) + 1) + "|"]
    lines += [f"| {title(kind)} | {' | '.join(_rows[kind])} |" for kind in KINDS]
    PAGE.write_text(_INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_no_cell_is_silently_wrong(kind: str) -> None:
    torch.manual_seed(0)
    row = _rows[kind] = [cell(kind, method) for method in METHODS.values()]
    assert not [text for text in row if text.startswith(("SILENT", "UNNAMED"))], dict(zip(METHODS, row, strict=True))
    if os.environ.get("NESTOR_WRITE_GUARANTEES") != "1":
        assert list(map(outcome, row)) == list(map(outcome, documented()[title(kind)]))
