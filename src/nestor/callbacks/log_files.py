"""Loggers that write to a file: JSON lines, and a table of comma-separated values."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from nestor.callbacks.logger import Logger
from nestor.errors.options import typed
from nestor.training.run import Run

FIRST = ("step", "seconds")


class FileLogger(Logger):
    """Writes records to a file with a time stamp, in seconds since the start of ``engine.run``.

    Args:
        path: The file; its folders are created.
        every: Engine steps between two records.
    """

    @typed
    def __init__(self, path: str | Path, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.path = Path(path)
        self._file: TextIO | None = None
        self._start_time = 0.0

    def on_start(self, engine: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._start_time = time.perf_counter()

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _stamp(self, step: int) -> dict[str, Any]:
        return {"step": step, "seconds": round(time.perf_counter() - self._start_time, 3)}


class CSVLog(FileLogger):
    """Write one row per record: ``step,seconds,level/loss,...``; a cell without a value is empty.

    A validation is a row of its own, with columns ``validation/name``. Every row is flushed. A new metric (of an upper
    level that steps for the first time, or of a validation) becomes a new column at the right. The callback then writes
    the whole table to a temporary file and renames it, so that a crash cannot damage the table. A resumed run first
    deletes the rows after the step at which it resumes.

    Args:
        path: The file. Its folders are created; rows are appended to an existing table.
        every: Engine steps between two rows. Reading the metrics waits for the device.

    Raises:
        ValueError: If ``every`` is not a positive integer; at the start of a run, if the file exists and does
            not begin with the columns ``step,seconds``.

    Example:
        >>> from pathlib import Path
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> metrics = nestor.Engine(program, callbacks=[nestor.callbacks.CSVLog("metrics.csv")], seed=0).run(2)
        >>> Path("metrics.csv").read_text().splitlines()[0]
        'step,seconds,net/loss,net/gradient_norm'
    """

    @typed
    def __init__(self, path: str | Path, *, every: int = 1) -> None:
        super().__init__(path, every=every)
        self._columns: list[str] = []

    def on_start(self, engine: Run) -> None:
        super().on_start(engine)
        self._columns = self._header()
        if self._columns and engine.is_resuming:
            rows = self._rows()
            kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= engine.step]
            if len(kept) < len(rows):
                self._rewrite(kept)
        self._open()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        row = {**self._stamp(step), **metrics}
        if any(name not in self._columns for name in row):
            self._add_columns(row)
        assert self._file is not None
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def _header(self) -> list[str]:
        """Read the columns of an existing table; empty if there is no file."""
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
        if tuple(columns[: len(FIRST)]) != FIRST:
            raise ValueError(
                f"CSVLog({str(self.path)!r}) would append to a file that it did not write: its first line is "
                f"{','.join(columns)[:60]!r}, not '{','.join(FIRST)},...'. Choose another path, or move the file."
            )
        return columns

    def _open(self) -> None:
        is_cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = self.path.open("a", newline="", encoding="utf-8")
        if is_cut:  # a crash cut the last row: end that line, so that the next row begins a new line
            self._file.write("\n")

    def _add_columns(self, row: Mapping[str, float]) -> None:
        """Rewrite the table, with the columns of ``row`` added."""
        self._close()
        rows = self._rows()
        self._columns = list(dict.fromkeys([*self._columns, *row]))
        self._rewrite(rows)
        self._open()

    def _rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, restkey="rest", restval=""))

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Replace the file by a table of ``rows`` with the present columns."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)


class JSONLines(FileLogger):
    """Write one JSON object per line: ``{"step": ..., "seconds": ..., "level/loss": ..., ...}``.

    A validation is a line of its own, with the keys ``validation/name``. Every line is flushed. A resumed run first
    deletes the lines after the step at which it resumes.

    Args:
        path: The file. Its folders are created; lines are appended to an existing file.
        every: Engine steps between two lines. Reading the metrics waits for the device.
        labels: Further entries of every line, such as the name of the run.

    Raises:
        ValueError: If ``every`` is not a positive integer.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> lines = nestor.callbacks.JSONLines("metrics.jsonl", labels={"run": "one"})
        >>> metrics = nestor.Engine(program, callbacks=[lines], seed=0).run(2)
        >>> [json.loads(line)["net/loss"] for line in Path("metrics.jsonl").read_text().splitlines()]
        [2.0, 0.5]
    """

    @typed
    def __init__(self, path: str | Path, *, every: int = 1, labels: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, every=every)
        self.labels = dict(labels or {})

    def on_start(self, engine: Run) -> None:
        super().on_start(engine)
        if engine.is_resuming and self.path.exists():
            self._delete_after(engine.step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({**self.labels, **self._stamp(step), **metrics}) + "\n")
        self._file.flush()

    def _delete_after(self, step: int) -> None:
        """Delete the lines after ``step``: the killed run wrote them, and the resumed run writes them again."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run may be incomplete
                continue
            own = all(entry.get(key) == value for key, value in self.labels.items())
            if not own or entry["step"] <= step:
                kept.append(line)
        partial = self.path.with_suffix(self.path.suffix + ".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
