"""How tables are shown: as text in a terminal, as HTML in a notebook."""

import io
from collections.abc import Mapping
from html import escape
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 100
"""Columns of the text of a table."""

COMPACT: Mapping[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
"""Options of a table with many columns."""

# A longer name of a response takes two lines.
_LONG = 24


def broken(response: str) -> str:
    """Break the long name of a response before what is inside of it."""
    return response.replace("(", "(\n  ", 1) if len(response) > _LONG else response


def as_text(table: RenderableType) -> str:
    """Render a table as text, ``WIDTH`` columns wide at most."""
    console = Console(file=io.StringIO(), width=WIDTH)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def as_html(table: Table) -> str:
    """Render a table as HTML: plain tags that take the style of the page around them."""
    heads = "".join(f"<th>{_html(column.header)}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    sides = [column.justify for column in table.columns]
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align: {side}">{_html(cell)}</td>' for side, cell in zip(sides, row, strict=True))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{_html(table.title)}</caption>" if table.title else ""
    below = f"<p>{_html(table.caption)}</p>" if table.caption else ""
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"


class Shown:
    """A base of objects that print as a table, and that a notebook shows as one."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return the texts from which a notebook chooses."""
        return {"text/plain": str(self), "text/html": as_html(self.__rich__())}


def _html(cell: RenderableType) -> str:
    plain = Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
    return escape(plain).replace("\n", "<br>")
