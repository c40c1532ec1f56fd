"""Every link of the README, the contributors' page and the site leads somewhere; addresses elsewhere are well formed.

Pages are read in the repository and on the site, which name the anchors of headings by different rules.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md")), *sorted(DOCS.rglob("*.md"))]
_HTML_TARGET = re.compile(r"""<(?:a|img)\b[^>]*\b(?:href|src)=["']([^"']*)["']""")
_HTML_ANCHOR = re.compile(r"""<\w+\b[^>]*\bid=["']([^"']+)["']""")


@cache
def tokens(path: Path) -> list[Token]:
    """The pieces of a page: blocks, and what is in their lines."""
    parsed = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    return [piece for token in parsed for piece in (token, *(token.children or ()))]


def targets(path: Path) -> Iterator[str]:
    """Where the links and the pictures of a page lead, in Markdown and in HTML; code has none."""
    for token in tokens(path):
        if token.type in ("html_block", "html_inline"):
            yield from _HTML_TARGET.findall(token.content)
        if token.type in ("link_open", "image"):
            yield str(token.attrs.get("href", token.attrs.get("src")))


def in_repository(title: str) -> str:
    """The anchor of a heading where Markdown is shown as a file: every space is a hyphen."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def on_site(title: str) -> str:
    """The anchor of a heading on the site: no accents, one hyphen for some spaces."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@cache
def anchors(path: Path, site: bool) -> frozenset[str]:
    """The anchors of a page: of its headings, and those that it sets."""
    found, before = set(), ""
    for token in tokens(path):
        if token.type in ("html_block", "html_inline"):
            found |= set(_HTML_ANCHOR.findall(token.content))
        if token.type == "inline" and before == "heading_open":
            pieces = [child.content for child in token.children or () if child.type in ("text", "code_inline")]
            found.add((on_site if site else in_repository)("".join(pieces)))
        before = token.type
    return frozenset(found)


def fault(page: Path, target: str) -> str | None:
    """Say what is wrong with a link."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        right = parts.scheme == "https" and re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z]{2,}", parts.netloc)
        return None if right and " " not in target else "not a well formed address"
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.exists():
        return "no such file"
    site = page.is_relative_to(DOCS)
    if site and not path.is_relative_to(DOCS):
        return "leaves the site"
    if parts.fragment and path.suffix != ".md":
        return "an anchor of a file that has none"
    if not parts.fragment or (path.is_relative_to(DOCS / "reference") and "." in parts.fragment):
        return None  # names of objects in the reference: mkdocs checks them
    views = {site, False}
    return None if all(parts.fragment in anchors(path, view) for view in views) else "no such anchor"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, anchors are those of headings, and pages of the site do not leave it."""
    faults = {target: found for target in targets(page) if (found := fault(page, target))}
    assert not faults


def test_pages_have_many_links() -> None:
    """The checks above look at something: links, pictures, anchors and addresses."""
    found = [(page, target) for page in PAGES for target in targets(page)]
    assert len(found) > 120
    assert sum(target.startswith("https://") for _, target in found) > 2
    assert sum("#" in target and "//" not in target for _, target in found) > 15
    assert sum(target.endswith(".png") for _, target in found) > 8


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("docs/nowhere.md", "no such file"),
        ("docs/training.md#nowhere", "no such anchor"),
        ("docs/training.md#several-processes", None),
        ("docs/gallery.md#hyper-cleaning", None),
        ("#the-idea", None),
        ("LICENSE#x", "an anchor of a file that has none"),
        ("http://arxiv.org/abs/1806.09055", "not a well formed address"),
        ("https://arxiv/abs/1806.09055", "not a well formed address"),
        ("https://arxiv.org/abs/1806.09055", None),
    ],
)
def test_faults_are_found(target: str, expected: str | None) -> None:
    """Of the README."""
    assert fault(ROOT / "README.md", target) == expected


def test_pages_of_the_site_do_not_leave_it() -> None:
    """A link from ``docs`` to the source works in the repository and not on the site."""
    assert fault(DOCS / "index.md", "../README.md") == "leaves the site"
    assert fault(DOCS / "index.md", "training.md#what-a-run-checks") is None


def test_links_in_code_are_no_links(tmp_path: Path) -> None:
    """Those in HTML and around pictures are."""
    page = tmp_path / "page.md"
    page.write_text(
        '`[a](b)`\n\n```python\nlosses[0](c)\n```\n\n[![x](d.png)](e.md) <a href="f.md">f</a>\n\n| [g](g) |\n| - |\n'
    )
    assert sorted(targets(page)) == ["d.png", "e.md", "f.md", "g"]
