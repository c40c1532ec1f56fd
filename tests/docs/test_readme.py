"""The README's code runs as printed, and says what it says."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nestor

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the table of libraries: the cells of the others, in the order of the head, by the first cell."""
    table = text[text.index("| | nestor |") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[2:] for row in cells}


def test_first_screen_has_everything() -> None:
    """The line for pip, the program, a picture and the comparison, within the first 60 lines."""
    screen = "\n".join(README.splitlines()[:60])
    for part in ("pip install .", "# after the first release", BLOCKS[0], "](docs/gallery/", "| | nestor |", '"0.8 x'):
        assert part in screen, part


def test_opening_program_has_twelve_statements() -> None:
    """At the most, those in its losses included."""
    assert 5 < sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(BLOCKS[0]))) <= 12


@pytest.mark.parametrize("seed", range(6))
def test_opening_program_prints_what_it_says(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As pasted, on the data that it makes: about 0.85 in right targets, 0.25 in noise."""
    torch.manual_seed(seed)
    run(BLOCKS[0])
    right, noise = (float(number) for number in capsys.readouterr().out.split())
    assert right == pytest.approx(0.85, abs=0.1)
    assert noise == pytest.approx(0.25, abs=0.1)


def test_table_of_libraries_is_a_part_of_the_long_one() -> None:
    """The others' cells are those of the home page; ours say yes, with a link each (tests/docs/test_links.py)."""
    ours, long = rows(README), rows((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert len(ours) >= 10
    assert {name: long.get(name) for name in ours} == ours
    table = README[README.index("| | nestor |") :].split("\n\n")[0].splitlines()[2:]
    assert all(re.match(r"\| [^|]+ \| \[yes\]\([\w/.#-]+\) \|", line) for line in table)


def test_trilevel_block_prints_the_hypergradient(capsys: pytest.CaptureFixture[str]) -> None:
    """The block shows the table and a finite total derivative."""
    namespace = run(BLOCKS[1])
    printed = capsys.readouterr().out
    assert "highest level first" in printed
    gradient = namespace["program"].hypergradient("top")["value"]
    assert gradient.shape == (3,)
    assert torch.isfinite(gradient).all()


def test_functional_block_prints_the_stated_value(capsys: pytest.CaptureFixture[str]) -> None:
    """d theta^3 / d weight = 3 weight^2 = 12 at weight 2."""
    run(BLOCKS[2])
    assert capsys.readouterr().out.strip() == "(tensor(12.),)"


def test_every_block_is_tested() -> None:
    """A new block needs a new test."""
    assert len(BLOCKS) == 3


def test_files_and_commands_exist() -> None:
    """Whatever is written like a path of the repository, and every target of make."""
    named = set(re.findall(r"`((?:tests|examples|benchmarks|docs|src)/[\w/.-]*)`", README))
    assert len(named) >= 2
    assert not {path for path in named if "NAME" not in path and not (ROOT / path).exists()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", "".join(re.findall(r"`[^`]+`|```sh\n.*?```", README, re.DOTALL))))
    assert {"demo", "test", "gallery"} <= targets
    assert all(re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE) for target in targets)


def test_public_names_are_importable_and_documented() -> None:
    """Everything in ``__all__`` exists and has a docstring."""
    for name in nestor.__all__:
        assert getattr(nestor, name).__doc__, name
