"""Processes that other libraries start: an engine in them computes what one process computes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
LOSS = re.compile(r"weights/loss (\d\.\d{12})")


def write_files(page: str, folder: Path) -> None:
    """The blocks of a recipe that are files."""
    text = (RECIPES / f"{page}.md").read_text(encoding="utf-8")
    for code, name in re.findall(r"^```\w+\n(# ([\w/]+\.\w+)\n.*?)^```$", text, re.DOTALL | re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")


def output(folder: Path, *command: str) -> str:
    """What a command of Python prints; an error is an assertion with its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
    return ended.stdout


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_of_fabric_equal_one(tmp_path: Path) -> None:
    """Fabric starts the second process; both loaders are whole in both."""
    pytest.importorskip("lightning")
    write_files("lightning", tmp_path)
    one, two = (LOSS.findall(output(tmp_path, "fabric_processes.py", count)) for count in "12")
    assert len(one) == 1
    assert one == two


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_of_accelerate_equal_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    write_files("accelerate", tmp_path)
    one = output(tmp_path, "accelerate_processes.py")
    two = output(tmp_path, *TORCHRUN, "accelerate_processes.py")
    assert one.startswith("1 processes")
    assert two.startswith("2 processes")
    assert LOSS.findall(one) == LOSS.findall(two) != []
