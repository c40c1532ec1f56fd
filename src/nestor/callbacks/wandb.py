"""Metrics for Weights & Biases."""

from __future__ import annotations

from typing import Any

from nestor.callbacks.extra import load_extra
from nestor.callbacks.logger import Logger
from nestor.training.run import Run


class WandB(Logger):
    """Log to a run of Weights & Biases, by engine step.

    The end of ``engine.run`` finishes the run, as failed if an error ended it. A second ``engine.run``, or one from a
    checkpoint, resumes the run by its id. In offline mode a resumed run has a second folder with the same id (``wandb
    sync --append``).

    Args:
        project: The project.
        every: Engine steps between two records. Reading the metrics waits for the device.
        **options: Options of ``wandb.init``, such as ``name``, ``config``, ``dir`` or ``mode="offline"``.

    Attributes:
        id: The id of the run; None before the first start.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If ``every`` is not a positive integer.
    """

    def __init__(self, project: str | None = None, *, every: int = 1, **options: Any) -> None:
        super().__init__(every=every)
        self.project = project
        self.options = options
        self.id: str | None = None
        self._wandb = load_extra("wandb", extra="wandb", needed_by="WandB")
        self._run: Any = None

    def on_start(self, engine: Run) -> None:
        resume = {} if self.id is None else {"id": self.id, "resume": "allow"}
        self._run = self._wandb.init(project=self.project, **{**self.options, **resume})
        self.id = self._run.id

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics; see :class:`Logger`."""
        self._run.log(metrics, step=step)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.id = state["id"]
