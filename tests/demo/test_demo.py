"""The demo: its command, its files, and its claim."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nestor.cli.demo import examples
from nestor.cli.main import main


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(examples()))
    try:
        return importlib.import_module("hyper_cleaning")
    finally:
        sys.path.pop(0)


def test_short_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps leave the picture, the metrics of all three runs, and the graph, and end with the table."""
    assert main(["demo", "--steps", "8", "--seed", "3", "--noise", "0.5", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"bilevel", "noisy labels", "clean labels only"}
    assert max(line["step"] for line in lines) == 8
    assert "classifier -->|best response| weights" in (tmp_path / "out" / "program.mmd").read_text()
    printed = capsys.readouterr().out
    assert "noisy labels, early-stopped" in printed
    assert "AUC" in printed


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--noise", "1.5"]])
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says which value is out of range."""
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert arguments[1] in capsys.readouterr().err


def test_example_is_short() -> None:
    """One readable file."""
    assert len((examples() / "hyper_cleaning.py").read_text().splitlines()) < 150


@pytest.mark.slow
def test_bilevel_is_above_every_baseline(tmp_path: Path, example: ModuleType) -> None:
    """In the mean over three seeds: above every baseline, 15 points above the noisy run's last step, AUC 0.9."""
    outcomes = [example.run(seed=seed, output=tmp_path / str(seed)) for seed in (0, 1, 2)]
    mean = {name: sum(o.accuracy[name] for o in outcomes) / 3 for name in outcomes[0].accuracy}
    bilevel = mean.pop("bilevel")
    assert bilevel > max(mean.values())
    assert bilevel >= mean["noisy labels"] + 0.15
    assert sum(o.auc for o in outcomes) / 3 >= 0.9
    assert max(sum(o.seconds.values()) for o in outcomes) < 90
