"""Metrics for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestor.callbacks.extra import load_extra
from nestor.callbacks.logger import Logger

if TYPE_CHECKING:
    from nestor.engine import Engine


class TensorBoard(Logger):
    """Write scalars that ``tensorboard --logdir folder`` shows, against engine steps.

    A second ``engine.run`` goes on in another file of the same folder, as TensorBoard expects.

    Args:
        folder: Where event files go; made if need be. One folder a run.
        every: Engine steps between two readings. Reading metrics waits for the device.

    Raises:
        ImportError: If tensorboard is not installed.
        ValueError: If ``every`` is not positive.
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.folder = Path(folder)
        self._summaries = load_extra("torch.utils.tensorboard", extra="tensorboard", needed_by="TensorBoard")
        self._writer: Any = None

    def on_start(self, engine: Engine) -> None:
        """Open an event file."""
        self._writer = self._summaries.SummaryWriter(str(self.folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add the scalars; see :class:`Logger`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
