"""nestor inspect: what it shows of whole and damaged checkpoints, and that no code of a checkpoint runs."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import nestor
from nestor.cli.main import main


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    net = torch.nn.Linear(30, 20)
    problem = nestor.Problem(
        net, lambda net: net.weight.square().sum(), optimizer=torch.optim.Adam(net.parameters(), 0.1)
    )
    saver = nestor.callbacks.Checkpoint(tmp_path / "run", every=3)
    nestor.Engine(nestor.Program(net=problem), seed=0, callbacks=[saver]).run(6)
    return tmp_path / "run"


def test_a_run_and_one_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps, the state of each folder, the levels with their sizes, the files."""
    for folder in (run, run / "step-00000006"):
        assert main(["inspect", str(folder)]) == 0
        printed = capsys.readouterr().out
        words = ["step-00000006", "whole", "Adam", "2.5 kB", "state.json", f"nestor {nestor.__version__}", "version 1"]
        assert all(word in printed for word in words)
        assert ("step-00000003" in printed) == (folder == run)


def test_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1; the file is named, and the newest whole checkpoint is shown."""
    state = run / "step-00000006" / "state.json"
    state.write_text(state.read_text().replace("1", "2"))
    assert main(["inspect", str(run)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "state.json has changed since it was written" in printed
    assert "step-00000003: format version 1" in printed
    assert main(["inspect", str(run / "step-00000006")]) == 1


def test_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "contains no checkpoint" in " ".join(capsys.readouterr().out.split())


def test_a_stranger(run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "trap",))

    for path in (run / "step-00000006").iterdir():
        path.write_bytes(pickle.dumps(Evil()))
    (run / "step-00000006" / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert main(["inspect", str(run)]) == 1
    assert not (tmp_path / "trap").exists()
