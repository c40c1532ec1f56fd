"""Metrics for MLflow."""

from __future__ import annotations

import time
from typing import Any

from nestor.callbacks.extra import load_extra
from nestor.callbacks.logger import Logger
from nestor.training.run import Run

# MLflow's REST interface accepts at most this many metrics in one request.
BATCH = 1_000


class MLflow(Logger):
    """Log to a run of MLflow, by engine step.

    The callback uses a client of its own and does not touch MLflow's active run. The end of ``engine.run`` terminates
    the run, as failed if an error ended it. A second ``engine.run``, or one from a checkpoint, continues the same run.

    Args:
        experiment: Name of the experiment; it is created if it does not exist.
        tracking_uri: Server, database (``sqlite:///runs.db``) or folder; None takes MLflow's default, which the
            environment variable ``MLFLOW_TRACKING_URI`` sets.
        run_name: Name of the run; None lets MLflow choose one.
        every: Engine steps between two records. Reading the metrics waits for the device.

    Attributes:
        run_id: The id of the run; None before the first start.

    Raises:
        ImportError: If mlflow is not installed.
        ValueError: If ``every`` is not a positive integer.
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

    def on_start(self, engine: Run) -> None:
        self._client = self._mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        experiment_id = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self.run_id = self._client.create_run(experiment_id, run_name=self.run_name).info.run_id

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics, in batches; see :class:`Logger`."""
        now = time.time_ns() // 1_000_000
        entries = [self._mlflow.entities.Metric(name, value, now, step) for name, value in metrics.items()]
        for begin in range(0, len(entries), BATCH):
            self._client.log_batch(self.run_id, metrics=entries[begin : begin + BATCH])

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED")
            self._client = None

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run_id = state["run_id"]
