"""Every named error has a section of the page Troubleshooting, and its text ends with the name of that section."""

import inspect
import re
from pathlib import Path

import pytest

import nestor
from nestor import errors

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ERRORS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, nestor.NestorError | nestor.NestorWarning) and kind.__module__ == errors.__name__
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_has_a_section(name: str) -> None:
    assert re.search(rf"^## {name}$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, kind in ERRORS.items() if issubclass(kind, nestor.NestorError)])
def test_a_text_ends_with_the_section(name: str) -> None:
    error = ERRORS[name]("It failed.", level="net", step=3)
    assert str(error) == f"[level 'net', step 3] It failed. (docs/troubleshooting.md#{name.lower()})"


def test_a_private_subclass_names_the_section_of_its_base() -> None:
    class Special(nestor.ReplayError):
        pass

    assert str(Special("It failed.")).endswith("#replayerror)")
