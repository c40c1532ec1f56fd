"""Metrics for MLflow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nestor.callbacks.extra import load_extra
from nestor.callbacks.logger import Logger

if TYPE_CHECKING:
    from nestor.engine import Engine

# Of one request, by MLflow's REST interface.
MOST = 1_000


class MLflow(Logger):
    """Log to a run of MLflow, against engine steps.

    It talks through a client of its own, so MLflow's active run is left alone. The run is terminated at the end of
    ``engine.run``, as failed if an error ended it; a second ``engine.run``, and one from a checkpoint, go
    on in the same run.

    Args:
        experiment: Name of the experiment; made if it is not there.
        tracking_uri: Server, database (``sqlite:///runs.db``) or folder; None is MLflow's own choice, which
            ``MLFLOW_TRACKING_URI`` sets.
        run_name: Name of the run; None lets MLflow invent one.
        every: Engine steps between two readings. Reading metrics waits for the device.

    Attributes:
        run_id: The run's id; None before the first start.

    Raises:
        ImportError: If mlflow is not installed.
        ValueError: If ``every`` is not positive.
    """

    def __init__(
        self, experiment: str, *, tracking_uri: str | None = None, run_name: str | None = None, every: int = 1
    ) -> None:
        super().__init__(every=every)
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.run_name = run_name
        self.run_id: str | None = None
        self._mlflow = load_extra("mlflow", extra="mlflow", needed_by="MLflow")
        self._client: Any = None

    def on_start(self, engine: Engine) -> None:
        """Start the run, or go on with it."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        place = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self.run_id = self._client.create_run(place, run_name=self.run_name).info.run_id

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the numbers in as few requests as may be; see :class:`Logger`."""
        now = time.time_ns() // 1_000_000
        batch = [self._mlflow.entities.Metric(name, value, now, step) for name, value in metrics.items()]
        for begin in range(0, len(batch), MOST):
            self._client.log_batch(self.run_id, metrics=batch[begin : begin + MOST])

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Terminate the run."""
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED")
            self._client = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in that run."""
        self.run_id = state["run_id"]
