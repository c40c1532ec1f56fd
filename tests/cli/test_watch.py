"""nestor watch: what it shows of a run that is writing."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nestor.cli.main import main
from nestor.cli.watch import POINTS, State, Tail, bars, newest


def entry(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds": 0.5 * step, "net/loss": 1.0 / step, "w/loss": float(step), **more}


def write(path: Path, entries: list[dict[str, Any]], mode: str = "w") -> Path:
    with path.open(mode) as file:
        file.writelines(json.dumps(one) + "\n" for one in entries)
    return path


def shown(state: State) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(state.table())
    return captured.get()


def test_once_prints_every_level_the_highest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "metrics.jsonl", [entry(step) for step in range(1, 6)])
    assert main(["watch", str(tmp_path), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "step 5, 2 s, 2 steps/s" in printed
    assert printed.index("\nw ") < printed.index("\nnet ")
    assert "█▃" in printed  # the loss of net falls
    assert "▁▃▅▇█" in printed


def test_a_file_without_a_terminal_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No loop where nobody looks."""
    file = write(tmp_path / "metrics.jsonl", [entry(1)])
    assert main(["watch", str(file)]) == 0
    assert "step 1" in capsys.readouterr().out


def test_a_tail_reads_what_is_new(tmp_path: Path) -> None:
    """An incomplete line waits for its end; a file that was written anew is read from its beginning."""
    file = write(tmp_path / "metrics.jsonl", [entry(1), entry(2)])
    tail = Tail(file)
    assert [one["step"] for one in tail.read()] == [1, 2]
    assert tail.read() == []
    with file.open("a") as opened:
        opened.write('{"step": 3, "net/')
    assert tail.read() == []
    with file.open("a") as opened:
        opened.write('loss": 1.0}\nnot JSON\n')
    assert [one["step"] for one in tail.read()] == [3]
    write(file, [entry(1)])
    assert [one["step"] for one in tail.read()] == [1]


def test_a_new_run_in_the_file_begins_anew() -> None:
    state = State()
    state.add([entry(step, run="first") for step in (1, 2, 3)])
    state.add([entry(1, run="second")])
    assert list(state.metrics["net"]["loss"]) == [1.0]
    assert "run=second" in shown(state)


def test_a_number_that_is_not_finite_is_seen() -> None:
    state = State()
    state.add([entry(1), entry(2) | {"net/loss": float("nan")}])
    text = shown(state)
    assert "nan" in text
    assert "x" in bars(state.metrics["net"]["loss"])


def test_a_line_of_bars_is_bounded() -> None:
    state = State()
    state.add([entry(step) for step in range(1, 500)])
    assert len(bars(state.metrics["net"]["loss"])) == POINTS
    assert bars([2.0, 2.0]) == "▁▁"
    assert bars([float("inf")]) == "x"


def test_a_run_that_stands_still_says_so() -> None:
    state = State()
    state.add([entry(1)])
    state.written -= 3_600
    assert "nothing written for 3,600 s" in shown(state)


def test_the_newest_file_of_a_folder(tmp_path: Path) -> None:
    import os

    old, new = write(tmp_path / "a.jsonl", [entry(1)]), write(tmp_path / "b.jsonl", [entry(2)])
    os.utime(old, (1, 1))
    assert newest(tmp_path) == new
    assert newest(old) == old


def test_no_file_is_an_error_that_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 1
    assert "JSONLines" in capsys.readouterr().out
