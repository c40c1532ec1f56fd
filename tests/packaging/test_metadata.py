"""What PyPI shows: the description and the links, with public addresses and without."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import nestor

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPOSITORY = "https://host.example/someone/nestor"
FILES, PICTURES = f"{REPOSITORY}/blob/v{nestor.__version__}/", f"{REPOSITORY}/raw/v{nestor.__version__}/"


def metadata(**addresses: str) -> Any:
    """The metadata as hatchling builds them, with other addresses than those of ``pyproject.toml``."""
    core = pytest.importorskip("hatchling.metadata.core")
    plugins = pytest.importorskip("hatchling.plugin.manager")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config["tool"]["hatch"]["metadata"]["hooks"]["custom"].update({"repository": "", "documentation": "", **addresses})
    return core.ProjectMetadata(str(ROOT), plugins.PluginManager(), config).core


class Targets(HTMLParser):
    """Collects where the links and pictures of a page lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and not (found["href"] or "").startswith("#"):  # PyPI gives each heading an anchor
            self.links.append(found["href"] or "")
        if tag == "img":
            self.pictures.append(found["src"] or "")


def on_pypi(description: str) -> str:
    """The description as PyPI renders it."""
    rendered = pytest.importorskip("readme_renderer.markdown").render(description)
    assert rendered is not None
    return str(rendered)


def test_without_an_address_nothing_is_invented() -> None:
    """The description is the README as it is, and there are no links of the project."""
    built = metadata()
    assert built.readme == README
    assert built.readme_content_type == "text/markdown"
    assert built.urls == {}
    found = Targets(on_pypi(built.readme))
    assert len(found.links) > 20
    assert not [target for target in [*found.links, *found.pictures] if "://" in target]


def test_with_an_address_every_link_is_absolute_and_leads_to_a_file() -> None:
    """Of the description as PyPI renders it, at the tag of the version."""
    built = metadata(repository=f"{REPOSITORY}/", documentation="https://docs.example")
    found = Targets(on_pypi(built.readme))
    assert len(found.links) == len(Targets(on_pypi(README)).links)
    assert found.pictures
    for targets, start in ((found.links, FILES), (found.pictures, PICTURES)):
        assert not [target for target in targets if not target.startswith(start)]
        paths = [target.removeprefix(start).split("#")[0] for target in targets]
        assert not [path for path in paths if not (ROOT / path).exists()]
    assert built.urls == {
        "Changelog": f"{FILES}CHANGELOG.md",
        "Documentation": "https://docs.example",
        "Repository": REPOSITORY,
    }


def test_code_and_prose_stay_as_they_are() -> None:
    """Only the targets of links differ."""
    built = metadata(repository=REPOSITORY)
    assert "Documentation" not in built.urls
    assert built.readme.replace(FILES, "").replace(PICTURES, "") == README


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/a.md#b)", f"[a]({FILES}docs/a.md#b)"),
        ("![a](a.png)", f"![a]({PICTURES}a.png)"),
        ("[![a](a.png)](a.md)", f"[![a]({PICTURES}a.png)]({FILES}a.md)"),
        ("[`f`](a.md)", f"[`f`]({FILES}a.md)"),
        ("[a](https://host.example) [b](#b) [c](mailto:c)", "[a](https://host.example) [b](#b) [c](mailto:c)"),
        ("`x[0](y)` and [a](a.md)", f"`x[0](y)` and [a]({FILES}a.md)"),
        ("```python\nlosses[0](batch)\n```\n", "```python\nlosses[0](batch)\n```\n"),
    ],
)
def test_links_of_every_form(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in links are made absolute too; code and addresses are not touched."""
    pytest.importorskip("hatchling")
    monkeypatch.syspath_prepend(str(ROOT))
    from hatch_build import with_absolute_links

    hook = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    addresses = {**hook["custom"], "repository": REPOSITORY}
    assert with_absolute_links(text, addresses, nestor.__version__) == expected


def test_description_needs_no_formulas() -> None:
    """PyPI renders no mathematics; tables and pictures it does."""
    outside = re.sub(r"```.*?```|`[^`]*`", "", README, flags=re.DOTALL)
    assert "$" not in outside
    html = on_pypi(README)
    assert html.count("<table>") >= 5
    assert "<img" in html
    assert "<pre" in html


def test_no_file_names_another_address_of_the_project() -> None:
    """The addresses are in ``pyproject.toml`` alone, and empty, or all in that one place."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "mkdocs.yml", "Makefile"]
    files = [ROOT / name for name in names]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.*"), *(ROOT / "src").rglob("*.py")]
    own = re.compile(r"https?://[^\s)>\"'`]*nestor", re.IGNORECASE)
    assert len(files) > 100
    assert not [str(path) for path in files if path.is_file() and own.search(path.read_text(encoding="utf-8"))]
