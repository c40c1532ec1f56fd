"""Metrics for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestor.callbacks.extra import load_extra
from nestor.callbacks.logger import Logger
from nestor.training.run import Run


class TensorBoard(Logger):
    """Write scalars by engine step for ``tensorboard --logdir folder``.

    A second ``engine.run`` writes another event file to the same folder, as TensorBoard expects.

    Args:
        folder: The folder of the event files; it is created. Use one folder per run.
        every: Engine steps between two records. Reading the metrics waits for the device.

    Raises:
        ImportError: If tensorboard is not installed.
        ValueError: If ``every`` is not a positive integer.
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.folder = Path(folder)
        self._summaries = load_extra("torch.utils.tensorboard", extra="tensorboard", needed_by="TensorBoard")
        self._writer: Any = None

    def on_start(self, engine: Run) -> None:
        self._writer = self._summaries.SummaryWriter(str(self.folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add the scalars; see :class:`Logger`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
