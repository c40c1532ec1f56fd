"""Loggers for tracking services: MLflow, TensorBoard, Weights & Biases."""

import importlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from nestor.callbacks.logger import Logger
from nestor.errors.options import typed
from nestor.training.run import Run

# MLflow's REST interface accepts at most this many metrics in one request.
BATCH = 1_000


class MLflow(Logger):
    """Log to a run of MLflow, by engine step.

    The callback creates its own client and does not change MLflow's active run. The end of ``engine.run`` terminates
    the run, with status ``FAILED`` if an error ended it and ``FINISHED`` otherwise. A second ``engine.run``, or one
    that resumes from a checkpoint, continues the same run.

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

    Example:
        >>> logger = nestor.callbacks.MLflow("weights", tracking_uri="sqlite:///runs.db", run_name="one", every=100)
        >>> logger.run_id is None  # before the first start
        True
    """

    @typed
    def __init__(
        self, experiment: str, *, tracking_uri: str | None = None, run_name: str | None = None, every: int = 1
    ) -> None:
        super().__init__(every=every)
        self.experiment, self.tracking_uri, self.run_name = experiment, tracking_uri, run_name
        self.run_id: str | None = None
        self._mlflow = _load("mlflow", self)
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


class TensorBoard(Logger):
    """Write scalars by engine step for ``tensorboard --logdir folder``.

    A second ``engine.run`` writes another event file to the same folder. TensorBoard merges the files of a folder.

    Args:
        folder: The folder of the event files; it is created. Use one folder per run.
        every: Engine steps between two records. Reading the metrics waits for the device.

    Raises:
        ImportError: If tensorboard is not installed.
        ValueError: If ``every`` is not a positive integer.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> metrics = nestor.Engine(program, callbacks=[nestor.callbacks.TensorBoard("runs/one")], seed=0).run(2)
        >>> import os
        >>> len(os.listdir("runs/one"))  # tensorboard --logdir runs/one
        1
    """

    @typed
    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.folder = Path(folder)
        self._summaries = _load("torch.utils.tensorboard", self)
        self._writer: Any = None

    def on_start(self, engine: Run) -> None:
        self._writer = self._summaries.SummaryWriter(str(self.folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(Logger):
    """Log to a run of Weights & Biases, by engine step.

    The end of ``engine.run`` finishes the run, with exit code 1 if an error ended it and 0 otherwise. A second
    ``engine.run``, or one that resumes from a checkpoint, resumes the run by its id. In offline mode a resumed run has
    a second folder with the same id (``wandb sync --append``).

    Args:
        project: The project.
        every: Engine steps between two records. Reading the metrics waits for the device.
        **options: Options of ``wandb.init``, such as ``name``, ``config``, ``dir`` or ``mode="offline"``.

    Attributes:
        id: The id of the run; None before the first start.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If ``every`` is not a positive integer.

    Example:
        >>> logger = nestor.callbacks.WandB("weights", every=100, mode="offline", config={"lr": 0.1})
        >>> logger.id is None  # before the first start
        True
    """

    @typed
    def __init__(self, project: str | None = None, *, every: int = 1, **options: Any) -> None:
        super().__init__(every=every)
        self.project, self.options = project, options
        self.id: str | None = None
        self._wandb = _load("wandb", self)
        self._run: Any = None

    def on_start(self, engine: Run) -> None:
        resume = {} if self.id is None else {"id": self.id, "resume": "allow"}
        self._run = self._wandb.init(project=self.project, **{**self.options, **resume})
        self.id = self._run.id

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.id = state["id"]


def _load(module: str, logger: Logger) -> ModuleType:
    """Import the module of a service. The extra of nestor that installs it has the lower-case name of the logger.

    Raises:
        ImportError: If the import fails; the message says how to install the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = type(logger).__name__
        text = f"{name} needs {module}, which cannot be imported ({error}): pip install 'nestor[{name.lower()}]'"
        raise ImportError(text, name=module) from error
