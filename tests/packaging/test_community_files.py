"""CITATION.cff, SECURITY.md, and the templates of issues and pull requests."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import nestor

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def parsed(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


def test_citation_is_that_of_this_version() -> None:
    """The keys that version 1.2.0 of the format demands, of the right kinds; no key that it does not know."""
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == nestor.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["type"] == "software"
    assert citation["authors"] == [{"name": "The nestor developers"}]
    assert all(isinstance(citation[key], str) and citation[key] for key in ("message", "title", "abstract"))
    known = {"cff-version", "message", "title", "authors", "abstract", "type", "version", "license", "keywords"}
    known |= {"date-released", "doi", "repository-code", "url"}
    assert citation.keys() <= known


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_forms_of_issues(path: Path) -> None:
    """A form has a name, a description, and a body of labelled fields with different names."""
    form = parsed(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    fields = form["body"]
    assert len({field["id"] for field in fields}) == len(fields) >= 3
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_all_templates_are_here() -> None:
    assert {path.stem for path in TEMPLATES} == {"bug", "config", "feature"}


@pytest.mark.parametrize("name", ["SECURITY.md", ".github/pull_request_template.md"])
def test_named_files_and_commands_exist(name: str) -> None:
    """Paths, targets of make, and names of nestor; and no contact."""
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:tests|docs)/[\w/.]*|[A-Z]+\.md)`", text)
    targets = re.findall(r"`make (\w+)`", text)
    assert paths or targets
    assert not [path for path in paths if not (ROOT / path).exists()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for callback in re.findall(r"`callbacks\.(\w+)`", text):
        assert callback in nestor.callbacks.__all__
    assert not re.search(r"[\w.]+@[\w.]+|https?://", text)


def test_library_imports_nothing_that_opens_connections() -> None:
    """As SECURITY.md says: but for ``torch.distributed`` and the two services of metrics."""
    network = {
        "aiohttp",
        "ftplib",
        "http",
        "httpx",
        "huggingface_hub",
        "requests",
        "socket",
        "ssl",
        "urllib",
        "urllib3",
    }
    sources = sorted((ROOT / "src" / "nestor").rglob("*.py"))
    assert len(sources) > 200
    for path in sources:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        assert not network & {name.split(".")[0] for name in names}, path
        if {"wandb", "mlflow"} & {name.split(".")[0] for name in names}:
            assert path.name == "services.py"
