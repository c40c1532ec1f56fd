"""nestor plot: which panels and lines there are, and what it says when there is nothing to draw."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nestor
from nestor.cli import plot as plotting
from nestor.cli.main import main

pytest.importorskip("matplotlib")


def lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def descent(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds": 0.1, "net/loss": 10.0 ** (-step), "lam/loss": 1.0 / step, "net/lr": 0.1, **more}


def drawn(path: Path) -> dict[str, Any]:
    """The panels by title."""
    figure = plotting._draw(plotting.read({path: "run"}), "title")
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def test_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What JSONLines writes is drawn, from the folder and from the file."""
    weight = nestor.Variable(torch.ones(2))
    problem = nestor.Problem(
        weight, lambda weight: weight().square().sum(), optimizer=torch.optim.SGD(weight.parameters(), 0.1)
    )
    nestor.Engine(
        nestor.Program(weight=problem),
        callbacks=[nestor.callbacks.JSONLines(tmp_path / "metrics.jsonl")],
        validate=lambda weight: weight().sum(),
        validate_every=2,
    ).run(5)
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert f"Wrote {tmp_path / 'curves.png'}" in capsys.readouterr().out
    assert main(["plot", str(tmp_path / "metrics.jsonl"), "--output", str(tmp_path / "deep" / "a.png")]) == 0
    assert (tmp_path / "deep" / "a.png").exists()
    assert list(drawn(tmp_path / "metrics.jsonl")) == ["loss", "gradient norm", "validation: value"]


def test_panels_and_scales(tmp_path: Path) -> None:
    """One panel a metric, one line a level; logarithmic if positive and over more than two decades."""
    validation = {"step": 3, "validation/accuracy": 0.5}
    panels = drawn(lines(tmp_path / "a.jsonl", [*(descent(step) for step in range(1, 6)), validation]))
    assert list(panels) == ["loss", "validation: accuracy", "lr"]
    assert panels["loss"].get_yscale() == "log"
    assert panels["lr"].get_yscale() == "linear"
    net, lam = panels["loss"].get_lines()
    assert list(net.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(lam.get_ydata()) == [1 / step for step in range(1, 6)]
    assert net.get_color() != lam.get_color()
    negative = drawn(lines(tmp_path / "b.jsonl", [{"step": 1, "net/loss": -1}, {"step": 2, "net/loss": 1e5}]))
    assert negative["loss"].get_yscale() == "linear"


def test_runs_are_told_apart(tmp_path: Path) -> None:
    """By labels, by file, and where the steps start anew."""
    labelled = [descent(step, run=run) for run in ("bilevel", "baseline") for step in (1, 2)]
    curves = plotting.read({lines(tmp_path / "a.jsonl", labelled): "a"})
    assert list(curves["lr"]) == [("bilevel", "net"), ("baseline", "net")]
    again = lines(tmp_path / "b.jsonl", [descent(step, seed=3) for step in (1, 2, 1, 2, 3)])
    (curve,) = plotting.read({again: "again"})["lr"].values()
    assert [steps for steps, _ in curve] == [[1, 2], [1, 2, 3]]
    both = plotting.read({tmp_path / "a.jsonl": "a", again: again.stem})
    assert list(both["lr"]) == [("a, bilevel", "net"), ("a, baseline", "net"), ("b, seed=3", "net")]


def test_runs_of_several_folders_are_compared(tmp_path: Path) -> None:
    """Each run is named after its folder; one more part of the path where folders have the same name."""
    for name in ("first/seed", "second/seed"):
        (tmp_path / name).mkdir(parents=True)
        lines(tmp_path / name / "metrics.jsonl", [descent(step) for step in (1, 2)])
    runs = [tmp_path / "first" / "seed", tmp_path / "second" / "seed"]
    assert plotting._names(runs) == ["first/seed", "second/seed"]
    assert plotting._names([tmp_path / "a" / "b", tmp_path / "c.jsonl"]) == ["b", "c"]
    assert main(["plot", *map(str, runs), "--output", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
    files = {file: name for run in runs for file, name in plotting._files(run, run.parent.name)}
    assert list(plotting.read(files)["lr"]) == [("first", "net"), ("second", "net")]


def test_running_mean() -> None:
    """Over the window on either side, fewer at the ends."""
    assert plotting._smooth([1.0, 2.0, 6.0, 4.0], 1) == [1.5, 3.0, 4.0, 5.0]


def test_many_points_get_a_mean(tmp_path: Path) -> None:
    """A noisy metric is drawn twice, a schedule once."""
    entries = [{"step": s, "net/loss": 1 + (s * 7919 % 1000) / 1000, "net/lr": 0.1} for s in range(1, 801)]
    panels = drawn(lines(tmp_path / "a.jsonl", entries))
    assert [len(panels[name].get_lines()) for name in ("loss", "lr")] == [2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("", "no metrics to draw"),
        ('{"step": 1}\n', "no metrics to draw"),
        ("step,loss\n1,2\n", "line 1 is not JSON"),
        ('{"net/loss": 1}\n', 'line 1 is no object with a number "step"'),
        ('{"step": 1, "net/loss": 1}\nbroken\n{"step": 2}\n', "line 2 is not JSON"),
    ],
)
def test_errors(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, without a traceback, and with status 1."""
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["plot", str(path)]) == 1
    assert message in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()


def test_empty_folder_and_torn_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without lines says how to get some; a last line that is being written is left out."""
    assert main(["plot", str(tmp_path)]) == 1
    assert "has no *.jsonl file" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "net/loss": 1}\n{"step": 2, "net/l')
    assert main(["plot", str(tmp_path)]) == 0
