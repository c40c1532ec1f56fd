"""The site: it builds without a warning and without a network, and formulas become MathML."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / "docs" / "extensions"


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("markdown", "latex2mathml"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    return importlib.import_module("nestor_markdown")


def rendered(extension: ModuleType, text: str) -> str:
    import markdown

    return markdown.markdown(text, extensions=["pymdownx.superfences", extension.makeExtension()])


def test_formulas_become_mathml(extension: ModuleType) -> None:
    """In a line, on lines of their own, and in the directives of docstrings; code stays as it is."""
    pytest.importorskip("pymdownx")
    for text in ("With $x^2$.", "$$x^2$$", "Of a docstring:\n\n.. math:: x^2 +\n    y\n\nEnd.", "With :math:`x^2`."):
        assert "<msup>" in rendered(extension, text), text
        assert "$" not in rendered(extension, text)
    assert "<math" not in rendered(extension, "`$x^2$`, costs $5 and $6\n\n```sh\necho $A $B\n```")


def test_unknown_commands_are_errors(extension: ModuleType) -> None:
    """They would stand in the page as they are."""
    with pytest.raises(ValueError, match="No MathML"):
        extension.mathml(r"\nosuchcommand x", display=False)


def test_roles_lead_to_the_reference(extension: ModuleType) -> None:
    """Of public names; others are code. Examples are fenced."""
    lines = extension.Docstrings(None).run(
        ["See :class:`Neumann`, :class:`Callback` and :meth:`located`.", "", ">>> 1 + 1", "2"]
    )
    assert lines[0] == "See [`Neumann`][nestor.Neumann], [`Callback`][nestor.callbacks.Callback] and `located`."
    assert lines[2:] == ["", "```pycon", ">>> 1 + 1", "2", "```", ""]


@pytest.mark.slow
@pytest.mark.ci
def test_site_builds_strictly_and_asks_for_nothing_else(tmp_path: Path) -> None:
    """No warning, no formula left over, no style or script from elsewhere."""
    for name in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(EXTENSIONS), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text), page
        body = re.sub(r"<(pre|code|script).*?</\1>", "", text, flags=re.DOTALL)
        assert "$$" not in body, page
        assert ".. math::" not in body, page
