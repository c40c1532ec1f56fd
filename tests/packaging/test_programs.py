"""The pages of programs: every block runs as printed, top to bottom, and prints what the page says.

Numbers are those of a training. They may differ in the last digits on another processor, and the words may not.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from code_blocks import ROOT, blocks, says

PROGRAMS = ROOT / "docs" / "programs"
PAGES = sorted(path.stem for path in PROGRAMS.glob("*.md") if path.stem != "index")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def same(expected: str, got: str) -> bool:
    """Compare the words, and the numbers to 0.03 or 15 %."""
    if "Error:" in expected or not says(NUMBER.sub("#", expected), NUMBER.sub("#", got)):
        return says(expected, got)
    numbers, found = ([float(number) for number in NUMBER.findall(text)] for text in (expected, got))
    return found == pytest.approx(numbers, rel=0.15, abs=0.03)


def printed(code: str, place: str, line: int, namespace: dict[str, Any]) -> str:
    """What a block prints, and the error that ends it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            exec(compile("\n" * (line - 1) + code, place, "exec"), namespace)
        except Exception as error:
            return f"{output.getvalue()}{type(error).__name__}: {error}\n"
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_program_prints_what_its_page_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace and an empty folder; a warning is an error."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page}
    found = blocks(PROGRAMS / f"{page}.md")
    assert sum(bool(block.expected) for block in found) >= 2
    for block in found:
        place = f"docs/programs/{page}.md"
        got = printed(block.code, place, block.line, namespace)
        assert same(block.expected, got), f"{place}:{block.line}\nexpected:\n{block.expected}\ngot:\n{got}"


def test_comparison_of_outputs() -> None:
    """Other words and other numbers are seen; the last digit is not."""
    assert same("error 0.88, one\n", "error 0.87, one\n")
    assert not same("error 0.88, one\n", "error 0.68, one\n")
    assert not same("error 0.88, one\n", "loss 0.88, one\n")
    assert not same("error 0.88\n", "error 0.88 0.88\n")
    assert not same("", "a warning\n")


def test_five_programs_are_listed() -> None:
    """The first page names each, and what it links to exists (tests/docs/test_links.py)."""
    index = (PROGRAMS / "index.md").read_text(encoding="utf-8")
    assert len(PAGES) == 5
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == set(PAGES)
    named = {
        path for page in PAGES for path in re.findall(r"`(examples/[\w.]+)`", (PROGRAMS / f"{page}.md").read_text())
    }
    assert len(named) >= 3
    assert not {path for path in named if not (ROOT / path).exists()}
