"""TensorBoard, Weights & Biases and MLflow: what their own readers find is what the engine read."""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nestor
from nestor.callbacks import Callback, MLflow, TensorBoard, Throughput, WandB

Make = Callable[..., nestor.Engine]


class Witness(Callback):
    """Keeps what the engine reads at every step, and every validation."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, float]]] = {}

    def on_step(self, engine: nestor.Engine) -> None:
        for name, value in engine.read_metrics().items():
            self.seen.setdefault(name, []).append((engine.step, value))

    def on_validation(self, engine: nestor.Engine, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.seen.setdefault(f"validation/{name}", []).append((engine.step, value))


def watched(make: Make, callback: Callback, *runs: int) -> Witness:
    """Run with a validation every second step."""
    witness = Witness()
    callbacks = [witness, Throughput(), callback]
    engine = make(callbacks=callbacks, validate=lambda net: {"bias": net.bias.sum()}, validate_every=2)
    for steps in runs:
        engine.run(steps)
    return witness


class Interrupt(Callback):
    """Ends a run with an error."""

    def on_step(self, engine: nestor.Engine) -> None:
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(make: Make, tmp_path: Path) -> None:
    """Read back by the event accumulator, over two runs of the engine."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    witness = watched(make, TensorBoard(tmp_path / "run"), 3, 2)
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((tmp_path / "run").iterdir()):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    assert [step for step, _ in sorted(found.pop("engine/steps_per_second"))] == [1, 2, 3, 4, 5]
    del found["engine/seconds_per_step"]
    assert found.keys() == witness.seen.keys()
    for name, points in witness.seen.items():
        steps, values = zip(*points, strict=True)
        assert [step for step, _ in found[name]] == list(steps)
        assert [value for _, value in found[name]] == pytest.approx(list(values), rel=1e-6)  # kept in float32


@pytest.mark.filterwarnings("ignore")
def test_mlflow(make: Make, tmp_path: Path) -> None:
    """Read back from its database: one run over two runs of the engine; an error fails it."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    logger = MLflow("bilevel", tracking_uri=uri, run_name="first")
    witness = watched(make, logger, 3, 2)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("bilevel").experiment_id])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (logger.run_id, "FINISHED", "first")
    for name, points in witness.seen.items():
        assert [(m.step, m.value) for m in client.get_metric_history(logger.run_id, name)] == points
    resumed = MLflow("bilevel", tracking_uri=uri)
    resumed.load_state_dict(logger.state_dict())
    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[resumed, Interrupt()]).run(3)
    assert client.get_run(logger.run_id).info.status == "FAILED"
    assert mlflow.active_run() is None


@pytest.mark.filterwarnings("ignore")
def test_wandb(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: read back from the record that ``wandb sync`` would send."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    logger = WandB("bilevel", mode="offline", dir=str(tmp_path), name="first", config={"rate": 0.1})
    witness = watched(make, logger, 3)
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert logger.id is not None
    assert logger.id in record.name
    # Another process writes the file; on a busy machine it ends later than the run.
    deadline = time.monotonic() + 30
    while not history(record) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert history(record) == witness.seen


def history(record: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the metrics from wandb's own file."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[tuple[int, float]]] = {}
    for data in records(record.read_bytes()):
        entry = Record()
        entry.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item}
        for name, value in row.items():
            if not name.startswith(("_", "engine/")):
                found.setdefault(name, []).append((row["_step"], value))
    return found


def records(data: bytes, header: int = 7, block: int = 32_768) -> Iterator[bytes]:
    """Read the log format of LevelDB: pieces with checksum (4 bytes), length (2) and kind (1), none across a block."""
    place, parts = header, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<4xHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


@pytest.mark.parametrize(
    ("build", "module", "extra"),
    [
        (lambda path: TensorBoard(path), "torch.utils.tensorboard", "tensorboard"),
        (lambda path: WandB("project"), "wandb", "wandb"),
        (lambda path: MLflow("experiment"), "mlflow", "mlflow"),
    ],
)
def test_missing_packages(
    build: Callable[[Path], Any], module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At construction, with the command that mends it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'nestor\[{extra}\]'"):
        build(tmp_path)


def test_import_is_light() -> None:
    """The callbacks can be imported without any of the packages."""
    names = ("tensorboard", "wandb", "mlflow", "matplotlib")
    code = f"import sys, nestor.__main__; print([name for name in {names} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
