"""CSVLog: what was written is what the engine read, in one table."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

import nestor
from nestor.callbacks import Callback, CSVLog

Make = Callable[..., nestor.Engine]


class Witness(Callback):
    """Keeps what the engine reads at every step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_step(self, engine: nestor.Engine) -> None:
        self.seen[engine.step] = engine.read_metrics()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_the_engine(make: Make, tmp_path: Path) -> None:
    """Columns that appear later are added; the rows before them are empty there."""
    path, witness = tmp_path / "deep" / "metrics.csv", Witness()
    make(callbacks=[witness, CSVLog(path)], validate=lambda net: net.bias.sum(), validate_every=3).run(4)
    rows = table(path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "3", "4", "4"]
    assert list(rows[0])[:3] == ["step", "seconds", "net/loss"]
    assert rows[0]["lam/loss"] == ""
    for row in rows:
        if not row["validation/value"]:
            numbers = {key: float(value) for key, value in row.items() if "/" in key and value}
            assert numbers == witness.seen[int(row["step"])]
    assert sum(bool(row["validation/value"]) for row in rows) == 2
    assert list(path.parent.iterdir()) == [path]


def test_every_and_a_second_run(make: Make, tmp_path: Path) -> None:
    """Every second step; a second run appends to the same table."""
    path = tmp_path / "metrics.csv"
    engine = make(callbacks=[CSVLog(path, every=2)])
    engine.run(4)
    engine.run(3)
    assert [row["step"] for row in table(path)] == ["2", "4", "6"]


def test_torn_row_stays_alone(make: Make, tmp_path: Path) -> None:
    """A new run after a crash does not write into the row that the crash cut short."""
    path = tmp_path / "metrics.csv"
    make(callbacks=[CSVLog(path)]).run(2)
    path.write_text(path.read_text() + "3,0.")
    make(callbacks=[CSVLog(path)]).run(2)
    assert [row["step"] for row in table(path)] == ["1", "2", "3", "1", "2"]


def test_other_files_and_bad_options(make: Make, tmp_path: Path) -> None:
    """A file that it did not write is left alone."""
    path = tmp_path / "thesis.txt"
    path.write_text("It was a dark and stormy night\n")
    with pytest.raises(ValueError, match="would append to a file that it did not write"):
        make(callbacks=[CSVLog(path)]).run(1)
    assert path.read_text() == "It was a dark and stormy night\n"
    with pytest.raises(ValueError, match=r"CSVLog\(every=0\)"):
        CSVLog(path, every=0)
