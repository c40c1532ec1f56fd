"""Metrics for Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nestor.callbacks.extra import load_extra
from nestor.callbacks.logger import Logger

if TYPE_CHECKING:
    from nestor.engine import Engine


class WandB(Logger):
    """Log to a run of Weights & Biases, against engine steps.

    The run is finished at the end of ``engine.run``, as failed if an error ended it. A second ``engine.run``, and one
    from a checkpoint, resume it by its id; offline, that makes a second folder with the same id (``wandb sync
    --append``).

    Args:
        project: The project.
        every: Engine steps between two readings. Reading metrics waits for the device.
        **options: Of ``wandb.init``, such as ``name``, ``config``, ``dir`` or ``mode="offline"``.

    Attributes:
        id: The run's id; None before the first start.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If ``every`` is not positive.
    """

    def __init__(self, project: str | None = None, *, every: int = 1, **options: Any) -> None:
        super().__init__(every=every)
        self.project = project
        self.options = options
        self.id: str | None = None
        self._wandb = load_extra("wandb", extra="wandb", needed_by="WandB")
        self._run: Any = None

    def on_start(self, engine: Engine) -> None:
        """Start the run, or resume it."""
        again = {} if self.id is None else {"id": self.id, "resume": "allow"}
        self._run = self._wandb.init(project=self.project, **{**self.options, **again})
        self.id = self._run.id

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the numbers; see :class:`Logger`."""
        self._run.log(metrics, step=step)

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id."""
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in that run."""
        self.id = state["id"]
