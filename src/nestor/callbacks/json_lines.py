"""Metrics as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nestor.callbacks.logger import Logger
from nestor.training.run import Run


class JSONLines(Logger):
    """Write one JSON object per line: ``{"step": ..., "seconds": ..., "level/loss": ..., ...}``.

    A validation is a line of its own, with the keys ``validation/name``. Every line is flushed. A resumed run first
    deletes the lines after the step at which it resumes.

    Args:
        path: The file. Its folders are created; lines are appended to an existing file.
        every: Engine steps between two lines. Reading the metrics waits for the device.
        labels: Further entries of every line, such as the name of the run.

    Raises:
        ValueError: If ``every`` is not a positive integer.
    """

    def __init__(self, path: str | Path, *, every: int = 1, labels: Mapping[str, Any] | None = None) -> None:
        super().__init__(every=every)
        self.path = Path(path)
        self.labels = dict(labels or {})
        self._file: TextIO | None = None
        self._start_time = 0.0

    def on_start(self, engine: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if engine.is_resuming and self.path.exists():
            self._delete_after(engine.step)
        self._file = self.path.open("a", encoding="utf-8")
        self._start_time = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line; see :class:`Logger`."""
        assert self._file is not None
        seconds = round(time.perf_counter() - self._start_time, 3)
        self._file.write(json.dumps({**self.labels, "step": step, "seconds": seconds, **metrics}) + "\n")
        self._file.flush()

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _delete_after(self, step: int) -> None:
        """Delete the lines after a step, which a killed run has written and the resumed run writes again."""
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
