"""A run that is killed at random instants ends with the bits of a run that is not."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from killed import KINDS, main

pytestmark = pytest.mark.slow
STEPS = 160
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "nestor", "killed"])


def start(kind: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    process = SERVER.Process(target=main, args=(kind, folder, STEPS))
    process.start()
    return process


def finish(kind: str, folder: Path) -> list[torch.Tensor]:
    process = start(kind, folder)
    process.join(300)
    assert process.exitcode == 0
    found: list[torch.Tensor] = torch.load(folder / "final.pt")
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def kill(kind: str, folder: Path, generator: random.Random, *, late: bool) -> None:
    """Start the run and kill it: at any instant, or, if ``late``, after it has saved a checkpoint."""
    before = saved(folder)
    process = start(kind, folder)
    begin = time.time()
    while late and process.is_alive() and saved(folder) == before and time.time() - begin < 200:
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.1 if late else 2.0))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)


def killed_and_resumed(kind: str, tmp_path: Path, kills: int, early: int) -> None:
    generator = random.Random(kind)
    folder = tmp_path / "killed"
    for index in range(kills):
        kill(kind, folder, generator, late=index >= early)
    assert saved(folder)
    got, expected = finish(kind, folder), finish(kind, tmp_path / "whole")
    assert all(map(torch.equal, got, expected))
    assert lines(folder) == lines(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob("*.partial"))


@pytest.mark.ci
@pytest.mark.parametrize("kind", KINDS)
def test_one_kill(kind: str, tmp_path: Path) -> None:
    """After the first checkpoint."""
    killed_and_resumed(kind, tmp_path, kills=1, early=0)


@pytest.mark.parametrize("kind", KINDS)
def test_four_kills(kind: str, tmp_path: Path) -> None:
    """Ten kinds of programs: forty kills, thirty of them after a checkpoint of that process."""
    killed_and_resumed(kind, tmp_path, kills=4, early=1)
