"""Markdown of the site: formulas as MathML, which needs no script and no network, and the markup of docstrings.

Docstrings are written for editors and ``help()``: ``.. math::``, ``:class:`` and ``>>>``. The same extension serves
mkdocs and Zensical. ``make docs`` puts its folder on the path of Python.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

SOURCE = Path(__file__).parents[2] / "src"
MODULES = ("nestor", "nestor.callbacks", "nestor.optim", "nestor.diagnostics")
ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([\w.]+)`")
INLINE_ROLE = re.compile(r":math:`([^`]+)`")
INLINE_MATH = r"(?<![\\$])\$(?![\s$])((?:\\.|[^\\$])+?)(?<!\s)\$(?![\d$])"
DISPLAY_MATH = re.compile(r"^([ \t]*)\$\$(.+?)\$\$", re.DOTALL | re.MULTILINE)


@cache
def public_names() -> dict[str, str]:
    """The address in the reference of every public name, by the name that docstrings use."""
    found: dict[str, str] = {}
    for module in reversed(MODULES):  # a name of two modules is documented under nestor
        for name in exported(SOURCE / module.replace(".", "/") / "__init__.py"):
            found[name] = found[f"{module}.{name}"] = f"{module}.{name}"
    found["nestor.diagnostics.check_hypergradient"] = "nestor.check_hypergradient"
    return found


def exported(path: Path) -> Iterator[str]:
    """The entries of ``__all__``, without importing the module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign) and getattr(targets[0], "id", "") == "__all__":
            yield from ast.literal_eval(node.value)


REPLACED = ((r"\arg\min", r"\text{arg min}"), (r"\_", "_"))
"""What the converter does not know."""


def mathml(formula: str, *, display: bool) -> str:
    """Write a formula of LaTeX as MathML.

    Raises:
        ValueError: If the converter does not know a command.
    """
    text = " ".join(formula.split())
    for old, new in REPLACED:
        text = text.replace(old, new)
    for size in (r"\Big", r"\big"):  # parentheses that grow with what they enclose
        if text.count(f"{size}(") == text.count(f"{size})"):
            text = text.replace(f"{size}(", r"\left(").replace(f"{size})", r"\right)")
    html = convert(text, display="block" if display else "inline")
    if "\\" in html:
        raise ValueError(f"No MathML for a command of {formula!r}.")
    return html


class Docstrings(Preprocessor):
    """Turn ``.. math::``, roles and examples of docstrings into Markdown; fenced code stays as it is."""

    def run(self, lines: list[str]) -> list[str]:
        done: list[str] = []
        place, fence = 0, ""
        while place < len(lines):
            line = lines[place]
            mark = re.match(r"\s*(```+|~~~+)", line)
            if mark and (not fence or mark[1].startswith(fence)):
                fence = "" if fence else mark[1]
            if fence or mark:
                done.append(line)
                place += 1
            elif line.lstrip().startswith(">>> "):
                place = self._example(lines, place, done)
            elif line.lstrip().startswith(".. math::"):
                place = self._formula(lines, place, done)
            else:
                done.append(ROLE.sub(linked, INLINE_ROLE.sub(r"$\1$", line)))
                place += 1
        return done

    @staticmethod
    def _example(lines: list[str], place: int, done: list[str]) -> int:
        """Fence the lines up to the next empty one."""
        margin = " " * (len(lines[place]) - len(lines[place].lstrip()))
        done += ["", f"{margin}```pycon"]
        while place < len(lines) and lines[place].strip():
            done.append(lines[place])
            place += 1
        done += [f"{margin}```", ""]
        return place

    @staticmethod
    def _formula(lines: list[str], place: int, done: list[str]) -> int:
        """Take the rest of the line, and the lines that are indented further."""
        margin = len(lines[place]) - len(lines[place].lstrip())
        formula = [lines[place].split(".. math::")[1]]
        place += 1
        while place < len(lines) and lines[place].strip() and not lines[place][: margin + 1].strip():
            formula.append(lines[place].strip())
            place += 1
        done += ["", f"{' ' * margin}$${' '.join(formula).strip()}$$", ""]
        return place


def linked(role: re.Match[str]) -> str:
    """A link to the reference, or code if the name is not public."""
    name = role[1]
    address = public_names().get(name)
    if address is None and "." in name:
        owner, member = name.rsplit(".", 1)
        address = f"{public_names()[owner]}.{member}" if owner in public_names() else None
    return f"[`{name}`][{address}]" if address else f"`{name}`"


class Display(Preprocessor):
    """Formulas between ``$$``, after fenced code has been taken out of the text."""

    def run(self, lines: list[str]) -> list[str]:
        def stored(match: re.Match[str]) -> str:
            html = f'<div class="formula">{mathml(match[2], display=True)}</div>'
            return f"\n{match[1]}{self.md.htmlStash.store(html)}\n"

        return DISPLAY_MATH.sub(stored, "\n".join(lines)).split("\n")


class Inline(InlineProcessor):
    """Formulas between ``$``."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str | Element, int, int]:  # type: ignore[override]
        return self.md.htmlStash.store(mathml(m[1], display=False)), m.start(0), m.end(0)


class NestorMarkdown(Extension):
    """All of it. Priorities: fenced code is taken out at 25, code in a line at 190."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the processors."""
        md.preprocessors.register(Docstrings(md), "nestor-docstrings", 27)
        md.preprocessors.register(Display(md), "nestor-display", 22)
        md.inlinePatterns.register(Inline(INLINE_MATH, md), "nestor-inline", 189)


def makeExtension(**options: object) -> NestorMarkdown:
    """Called by Markdown."""
    return NestorMarkdown(**options)
