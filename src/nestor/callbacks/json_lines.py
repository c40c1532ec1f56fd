"""Metrics as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from nestor.callbacks.callback import Callback
from nestor.callbacks.measuring import measured

if TYPE_CHECKING:
    from nestor.engine import Engine


class JSONLines(Callback):
    """Write one JSON object a line: ``{"step": ..., "seconds": ..., "level/loss": ..., ...}``.

    Validations write lines of their own, with keys ``validation/name``. Lines are flushed as they are written; a run
    that is resumed drops those after the step that it goes on from.

    Args:
        path: The file; folders are made, lines are appended.
        every: Engine steps between two lines. Reading metrics waits for the device.
        labels: Further entries of every line, such as the name of the run.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    only_first: ClassVar[bool] = True

    def __init__(self, path: str | Path, *, every: int = 1, labels: Mapping[str, Any] | None = None) -> None:
        if every < 1:
            raise ValueError(f"JSONLines(every={every}) must be at least 1.")
        self.path = Path(path)
        self.every = every
        self.labels = dict(labels or {})
        self._file: TextIO | None = None
        self._begin = 0.0

    def on_start(self, engine: Engine) -> None:
        """Open the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if engine.resuming and self.path.exists():
            self._forget_after(engine.step)
        self._file = self.path.open("a", encoding="utf-8")
        self._begin = time.perf_counter()

    def looks_at(self, engine: Engine, step: int) -> bool:
        """When it is due."""
        return step % self.every == 0

    def on_step(self, engine: Engine) -> None:
        """Write a line when one is due."""
        if engine.step % self.every == 0:
            self._write(engine, measured(engine))

    def on_validation(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Write the validation's line."""
        self._write(engine, {f"validation/{name}": value for name, value in metrics.items()})

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _forget_after(self, step: int) -> None:
        """Drop the lines that a run which was killed has written after the step from which it goes on."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off by the end of the process
                continue
            own = all(entry.get(key) == value for key, value in self.labels.items())
            if not own or entry["step"] <= step:
                kept.append(line)
        partial = self.path.with_suffix(self.path.suffix + ".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)

    def _write(self, engine: Engine, metrics: dict[str, float]) -> None:
        assert self._file is not None
        seconds = round(time.perf_counter() - self._begin, 3)
        self._file.write(json.dumps({**self.labels, "step": engine.step, "seconds": seconds, **metrics}) + "\n")
        self._file.flush()
