"""Callbacks that measure, and loggers that read them."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nestor
from nestor.callbacks import Callback, CSVLog, LearningRate, Memory, Throughput, measuring
from nestor.callbacks.measuring import resident

Make = Callable[..., nestor.Engine]


def test_loggers_read_measuring_callbacks(make: Make, tmp_path: Path) -> None:
    """One row holds the levels' metrics and everything measured."""
    path = tmp_path / "metrics.csv"
    make(callbacks=[Throughput(), Memory(), LearningRate(), CSVLog(path)]).run(2)
    with path.open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert {"net/loss", "lam/gradient_norm", "engine/steps_per_second", "memory/resident_mb", "lam/lr"} <= last.keys()
    assert (float(last["net/lr"]), float(last["net/lr_1"]), float(last["lam/lr"])) == (0.1, 0.02, 0.1)


def test_throughput_looks_back_over_its_window(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that we turn: steps of 1 s, then of 0.25 s."""
    now = 0.0

    class Tick(Callback):
        def on_step(self, engine: nestor.Engine) -> None:
            nonlocal now
            now += 1.0 if engine.step <= 4 else 0.25

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)
    speed = Throughput(window=2)
    assert math.isnan(speed.steps_per_second)
    assert speed.metrics() == {}
    engine = make(callbacks=[Tick(), speed])
    engine.run(4)
    assert speed.steps_per_second == 1.0
    engine.run(1)
    assert speed.steps_per_second == 4.0
    engine.run(1)
    assert speed.metrics() == {"engine/steps_per_second": 4.0, "engine/seconds_per_step": 0.25}


def test_memory_is_the_process() -> None:
    """500 MB more are seen as 500 MB more."""
    before = resident()
    block = torch.ones(500_000_000, dtype=torch.uint8)  # more than an allocator keeps of what earlier tests freed
    assert resident() - before > 0.8 * block.numel()
    assert Memory().metrics()["memory/resident_mb"] == pytest.approx(resident() / 1e6, rel=0.1)


def test_learning_rate_follows_schedules_and_tensors(make: Make) -> None:
    """The present rate, whether it is a number or a tensor; nothing before a run."""
    rates = LearningRate()
    assert rates.metrics() == {}
    engine = make(callbacks=[rates])
    optimizer = engine.program.levels["lam"].problem.optimizer
    assert optimizer is not None
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    engine.run(2)
    assert engine.read_all_metrics()["lam/lr"] == 0.5
    optimizer.param_groups[0]["lr"] = 0.25
    assert rates.metrics() == {"net/lr": 0.1, "net/lr_1": 0.02, "lam/lr": 0.25}


def test_bad_window() -> None:
    with pytest.raises(ValueError, match=r"Throughput\(window=0\)"):
        Throughput(window=0)
