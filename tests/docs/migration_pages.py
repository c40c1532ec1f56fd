"""The pages ``docs/migrate``: programs of another library and of nestor, and what both must agree on.

A block of Python names its library as its title. Blocks of one library go on from each other, top to bottom. A block
``text`` after a block is what that one prints. A sentence such as "`a` and `b` of both programs agree to 1e-12"
compares these variables of both libraries as they are at that place.
"""

import contextlib
import doctest
import io
import keyword
import random
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import nestor

FOLDER = Path(__file__).parents[2] / "docs" / "migrate"
PEERS = {"betty": "Betty", "higher": "higher", "torchopt": "TorchOpt", "learn2learn": "learn2learn", "jaxopt": "JAXopt"}
"""The title of the other library's blocks, by page, which is also the name of its package."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

YOURS = {"head", "lower_residual", "net", "rate"}
"""Names in these tables that are examples."""

_NAME = re.compile(r"[A-Za-z_]\w{2,}")
_FENCE = re.compile(r"^ *```(?P<info>\S[^\n]*)\n(?P<body>.*?)^ *```$", re.DOTALL | re.MULTILINE)
_AGREEMENT = re.compile(r"(?P<names>`\w+`(?:(?:,\s|\sand\s)`\w+`)*)\sof\sboth\sprograms\sagree\sto\s(?P<to>1e-\d+)")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    title: str
    body: str


@dataclass(frozen=True)
class Agreement:
    line: int
    names: tuple[str, ...]
    tolerance: float


def read(page: str) -> list[Block | Agreement]:
    """The blocks and the agreements of a page, in their order."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    found: list[Block | Agreement] = []
    for match in _FENCE.finditer(text):
        language, _, rest = match["info"].partition(" ")
        title = re.fullmatch(r'title="([^"]+)"', rest)
        found.append(
            Block(text[: match.start("body")].count("\n") + 1, language, title[1] if title else "", match["body"])
        )
    for match in _AGREEMENT.finditer(text):
        names = tuple(re.findall(r"`(\w+)`", match["names"]))
        found.append(Agreement(text[: match.start()].count("\n") + 1, names, float(match["to"])))
    return sorted(found, key=lambda item: item.line)


def names(page: str, column: int) -> set[str]:
    """The identifiers in the code of a column of the table of names: 0 for the other library, 1 for nestor."""
    section = (FOLDER / f"{page}.md").read_text(encoding="utf-8").split("## Names\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert len(cells) > 10
    assert all(len(row) == 3 for row in cells)
    found = {name for row in cells for code in re.findall(r"`([^`]*)`", row[column]) for name in _NAME.findall(code)}
    return {name for name in found if not keyword.iskeyword(name)}


def words(package: Path) -> set[str]:
    """Every identifier in the sources of a package."""
    return {word for path in package.rglob("*.py") for word in _NAME.findall(path.read_text(encoding="utf-8"))}


def run(page: str, titles: set[str]) -> dict[str, dict[str, Any]]:
    """Run the blocks with these titles, and compare where both libraries have run.

    Returns:
        What the blocks of each library have defined.

    Raises:
        AssertionError: If a block prints something else than the page, or numbers differ.
    """
    namespaces: dict[str, dict[str, Any]] = {title: {"__name__": "__main__"} for title in titles}
    items = read(page)
    for item, following in zip(items, [*items[1:], None], strict=True):
        place = f"docs/migrate/{page}.md"
        if isinstance(item, Agreement):
            if len(titles) == 2:
                check(item, *namespaces.values(), f"{place}:{item.line}")
        elif item.language == "python" and item.title in titles:
            printed = isinstance(following, Block) and following.language == "text"
            expected = following.body if printed else ""
            got = outcome(item, place, namespaces[item.title])
            assert doctest.OutputChecker().check_output(expected, got, FLAGS), (
                f"{place}:{item.line} ({item.title})\nexpected:\n{expected}\ngot:\n{got}"
            )
    return namespaces


def outcome(block: Block, place: str, namespace: dict[str, Any]) -> str:
    """What the block prints, the warnings of nestor, and the error that ends it; other libraries may warn."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", nestor.NestorWarning)
        try:
            exec(compile("\n" * (block.line - 1) + block.body, place, "exec"), namespace)
        except nestor.NestorError as error:
            return f"{printed.getvalue()}{type(error).__name__}: {error}\n"
    return printed.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in caught)


def check(agreement: Agreement, first: dict[str, Any], second: dict[str, Any], place: str) -> None:
    """Compare numbers, relative to the largest entry."""
    for name in agreement.names:
        a, b = (numbers(namespace[name]) for namespace in (first, second))
        assert a.shape == b.shape, f"{place}: {name} has the shapes {a.shape} and {b.shape}"
        assert a.size > 0, f"{place}: {name} is empty"
        assert np.isfinite(a).all(), f"{place}: {name} is not finite"
        scale = np.abs(b).max()
        assert scale > 0, f"{place}: {name} is zero"
        error = np.abs(a - b).max() / scale
        assert error <= agreement.tolerance, f"{place}: {name} differs by {error:.1e}"


def numbers(value: Any) -> np.ndarray:
    """As an array in double precision."""
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Random numbers and precision as in a new process, and as before afterwards."""
    states = torch.get_rng_state(), random.getstate()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(states[0])
        random.setstate(states[1])


@contextlib.contextmanager
def without_environments() -> Iterator[None]:
    """Let ``import learn2learn`` work without gym and torchvision, which MAML does not use.

    The three subpackages that need them are empty modules meanwhile.
    """
    names = [f"learn2learn.{part}" for part in ("gym", "text", "vision")]
    sys.modules.update({name: ModuleType(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
