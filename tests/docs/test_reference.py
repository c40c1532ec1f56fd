"""The API reference has every public name once, and the example in the docstring of each runs as printed."""

import doctest
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import nestor

PAGES = sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))
MODULES: tuple[ModuleType, ...] = (nestor, nestor.callbacks, nestor.optim, nestor.diagnostics)
TWICE = {"nestor.diagnostics.check_hypergradient"}  # documented as nestor.check_hypergradient
ERRORS = {name for name in nestor.__all__ if name.endswith(("Error", "Warning"))} - {"NestorError"}
WITHOUT_EXAMPLE = {"nestor.__version__"}  # a string has no docstring
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        for name in module.__all__:
            if f"{module.__name__}.{name}" not in TWICE:
                yield f"{module.__name__}.{name}", getattr(module, name)


PUBLIC = dict(public())


def test_every_public_name_is_documented_once() -> None:
    """On one page, and nothing else is."""
    listed = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
    assert sorted(listed) == sorted(PUBLIC)


METHODS = {
    f"{name}.{key}": method
    for name, kind in PUBLIC.items()
    if isinstance(kind, type)
    for key, method in vars(kind).items()
    if "Example:\n" in (getattr(method, "__doc__", None) or "")
}


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - WITHOUT_EXAMPLE) + sorted(METHODS))
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with the two names that the reference says."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = (PUBLIC | METHODS)[name].__doc__ or ""
    example = text.partition("Example:\n")[2]
    assert ">>> " in example, f"{name} has no example"
    assert "doctest: +SKIP" not in example
    test = doctest.DocTestParser().get_doctest(example, {"torch": torch, "nestor": nestor}, name, name, 0)
    report: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=report.append)
    assert not result.failed, "".join(report)


@pytest.mark.parametrize("name", sorted(ERRORS - {"ProcessError"}))  # it needs several processes
def test_errors_have_an_example_on_their_page(name: str) -> None:
    page = (PAGES[0].parents[1] / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert "```python\n" in section
