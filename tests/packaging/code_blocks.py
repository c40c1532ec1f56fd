"""The blocks of code of a page, and whether a program prints what the page says."""

import doctest
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """Code, the line where it starts, and what the block ``text`` behind it says that the code prints."""

    line: int
    code: str
    expected: str


def blocks(path: Path) -> list[Block]:
    """Return the blocks of Python of a page."""
    text = path.read_text(encoding="utf-8")
    found = [(text[: fence.start()].count("\n") + 2, *fence.groups()) for fence in _FENCE.finditer(text)]
    following = [*found[1:], (0, "", "")]
    return [
        Block(line, code, after if kind == "text" else "")
        for (line, language, code), (_, kind, after) in zip(found, following, strict=True)
        if language == "python"
    ]


def says(expected: str, got: str) -> bool:
    """Compare a text with what was printed; ``...`` stands for anything, and all spaces are alike."""
    return doctest.OutputChecker().check_output(expected, got, _FLAGS)
