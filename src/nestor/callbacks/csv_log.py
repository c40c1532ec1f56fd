"""Metrics as a table of comma-separated values."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from nestor.callbacks.logger import Logger

if TYPE_CHECKING:
    from nestor.engine import Engine

FIRST = ("step", "seconds")


class CSVLog(Logger):
    """Write one row a step: ``step,seconds,level/loss,...``; what a row does not have is empty.

    Validations are rows of their own, with columns ``validation/name``. Rows are flushed as they are written. A column
    that appears later (a level above that steps for the first time, a validation) is added at the right: the table is
    then written anew beside the file and put in its place at once, so a crash leaves one or the other whole. A run that
    is resumed drops the rows after the step that it goes on from.

    Args:
        path: The file; folders are made, rows are appended to a table that is there.
        every: Engine steps between two rows. Reading metrics waits for the device.

    Raises:
        ValueError: If ``every`` is not positive; at the start of a run if the file is there and no such table.
    """

    def __init__(self, path: str | Path, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.path = Path(path)
        self._columns: list[str] = []
        self._file: TextIO | None = None
        self._begin = 0.0

    def on_start(self, engine: Engine) -> None:
        """Open the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = self._header()
        self._begin = time.perf_counter()
        if self._columns and engine.resuming:
            rows = self._rows()
            kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= engine.step]
            if len(kept) < len(rows):
                self._replace(kept)
        self._open()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a row; see :class:`Logger`."""
        row = {"step": step, "seconds": round(time.perf_counter() - self._begin, 3), **metrics}
        if any(name not in self._columns for name in row):
            self._widen(row)
        assert self._file is not None
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Close the file."""
        self._close()

    def _header(self) -> list[str]:
        """Read the columns of the table that is there."""
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
        if tuple(columns[: len(FIRST)]) != FIRST:
            raise ValueError(
                f"CSVLog({str(self.path)!r}) would append to a file that it did not write: its first line is "
                f"{','.join(columns)[:60]!r}, not '{','.join(FIRST)},...'. Take another path, or move the file away."
            )
        return columns

    def _open(self) -> None:
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = self.path.open("a", newline="", encoding="utf-8")
        if torn:  # a row that a crash cut short stays alone on its line
            self._file.write("\n")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _widen(self, row: Mapping[str, float]) -> None:
        """Write the table anew with the columns of ``row`` as well."""
        self._close()
        rows = self._rows()
        self._columns = list(dict.fromkeys([*self._columns, *row]))
        self._replace(rows)
        self._open()

    def _rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, restkey="rest", restval=""))

    def _replace(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Put a table with the present columns in the place of the file."""
        beside = self.path.with_name(f"{self.path.name}.partial")
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        beside.replace(self.path)
