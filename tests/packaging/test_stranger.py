"""A stranger's path: the wheel in a clean environment, and the tutorial pasted into Python block by block."""

import re
from pathlib import Path

import pytest
from clean_environment import ROOT, Environment
from code_blocks import Block, blocks, says

# Python echoes this between the blocks.
_MARK = "=== end of a block ==="


def pasted(block: Block) -> str:
    """The text that is pasted: an empty line ends the last definition."""
    return f"{block.code}\nprint({_MARK!r}, flush=True)\n"


def shown(printed: str) -> str:
    """What a page shows of the output: of a traceback the last line, without the module of the error."""
    last = re.sub(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+", "", printed, flags=re.MULTILINE)
    return re.sub(r"^(?:\w+\.)+(\w+(?:Error|Warning): )", r"\1", last, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.ci
def test_tutorial_pasted_into_python_prints_what_the_page_says(environment: Environment, tmp_path: Path) -> None:
    """In the interpreter of the clean environment, in an empty folder."""
    tutorial = blocks(ROOT / "docs" / "tutorial.md")
    assert len(tutorial) > 8
    quiet = "import sys; sys.ps1 = sys.ps2 = ''; sys.stdout.reconfigure(line_buffering=True)\n"
    session = quiet + "".join(pasted(block) for block in tutorial)
    parts = environment.run("python", "-q", "-i", cwd=tmp_path, text=session).split(f"{_MARK}\n")
    assert len(parts) == len(tutorial) + 1
    echo = re.compile(r"^(?:>>> )?<torch\._C\.Generator object at \w+>\n", re.MULTILINE)  # of torch.manual_seed
    for block, part in zip(tutorial, parts, strict=False):
        expected = block.expected.replace("docs/tutorial.md", "<stdin>")  # where the losses are
        got = shown(echo.sub("", part))
        assert says(expected, got), f"docs/tutorial.md:{block.line}\nexpected:\n{expected}\ngot:\n{got}"
