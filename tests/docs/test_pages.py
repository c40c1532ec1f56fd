"""The pages of the site: every block of code runs as printed, top to bottom, and prints what the page says.

A block of Python is followed by a block ``text`` if it prints something or ends with an error; ``...`` stands for
anything. Links to files of the repository lead somewhere, and every page is in the navigation.
"""

import contextlib
import doctest
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nestor

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ["index", "install", "tutorial", "choose", "theory", "troubleshooting", "reference/index"]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SAME = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: str) -> list[tuple[int, str, str | None]]:
    """Line, code and expected output of each block of Python."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = [(text[: fence.start()].count("\n") + 2, *fence.groups()) for fence in FENCE.finditer(text)]
    following = [*found, (0, "", "")][1:]
    return [
        (line, code, after if kind == "text" else None)
        for (line, language, code), (_, kind, after) in zip(found, following, strict=True)
        if language == "python"
    ]


def outcome(code: str, place: str, line: int, namespace: dict[str, Any]) -> str:
    """What the block prints, its warnings, and the error that ends it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", nestor.NestorWarning)
        try:
            exec(compile("\n" * (line - 1) + code, place, "exec"), namespace)
        except Exception as error:
            return f"{printed.getvalue()}{type(error).__name__}: {error}\n"
    return printed.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in caught)


@pytest.fixture(autouse=True)
def _single_precision() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("page", PAGES)
def test_page_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace and an empty folder; no block but those with a block ``text`` prints, warns or raises."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page}
    for line, code, expected in blocks(page):
        place = f"docs/{page}.md"
        got = outcome(code, place, line, namespace)
        assert SAME.check_output(expected or "", got, FLAGS), f"{place}:{line}\nexpected:\n{expected}\ngot:\n{got}"


def test_every_error_has_its_section() -> None:
    """The text of an error ends with the section of its class; each public class, and each that is raised, has one."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    classes = [kind for kind in vars(nestor.errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in classes if issubclass(kind, nestor.NestorError | nestor.NestorWarning)]
    assert len(kinds) > 10
    assert {kind.__name__ for kind in kinds} <= set(sections)


def test_files_that_pages_name_exist() -> None:
    """Whatever is written like a path of the repository."""
    texts = [(DOCS / f"{page}.md").read_text(encoding="utf-8") for page in PAGES]
    path = re.compile(r"`((?:tests|examples|benchmarks|docs|src)/[\w/.-]*)`")
    named = {found for text in texts for found in path.findall(text)}
    assert len(named) > 5
    assert not {path for path in named if not (ROOT / path).exists()}


def test_every_page_is_in_the_navigation() -> None:
    """A page that is not is an error of ``make docs`` too."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:: |- )([\w/-]+\.md)$", nav, re.MULTILINE))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= listed


def test_at_least_sixty_blocks_run() -> None:
    """Of all pages; those that this file does not run have tests of their own."""
    assert sum(len(blocks(str(page.relative_to(DOCS))[:-3])) for page in DOCS.rglob("*.md")) >= 60
