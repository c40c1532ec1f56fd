"""Callbacks that measure a run: learning rates, memory, speed. Loggers write their measurements."""

import os
import sys
import time
from collections import deque
from pathlib import Path

import torch

from nestor.errors.options import check_options, typed
from nestor.training.callback import Callback
from nestor.training.run import Run

_STATM = Path("/proc/self/statm")


class Memory(Callback):
    """Measure memory, in units of 10^6 bytes.

    ``memory/resident_mb`` is the resident set of the process, or its peak on a system without ``/proc`` (macOS). With
    an accelerator, ``memory/accelerator_mb`` is the memory of all tensors on the accelerator.
    ``memory/accelerator_peak_mb`` is its maximum since the process began; MPS has no such counter.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> memory = nestor.callbacks.Memory()
        >>> metrics = nestor.Engine(program, callbacks=[memory], seed=0).run(1)
        >>> memory.metrics()["memory/resident_mb"] > 0
        True
    """

    def metrics(self) -> dict[str, float]:
        found = {"memory/resident_mb": resident() / 1e6} if resident() else {}
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and accelerator.type == "mps":
            found["memory/accelerator_mb"] = torch.mps.current_allocated_memory() / 1e6
        elif accelerator is not None:
            found["memory/accelerator_mb"] = torch.accelerator.memory_allocated() / 1e6
            found["memory/accelerator_peak_mb"] = torch.accelerator.max_memory_allocated() / 1e6
        return found


def resident() -> int:
    """Return the resident set of the process in bytes: the present one, else the peak, else 0 if neither is known."""
    if _STATM.exists():
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, other systems kibibytes


class LearningRate(Callback):
    """Measure the learning rates of every optimizer: ``level/lr``, and ``level/lr_1``, ... of further parameter groups.

    The values are the rates of the next step, because schedulers step after optimizers. Levels with ``update=...`` have
    no rate. There are no values before the first run.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, gamma=0.5)
        >>> level = nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd, scheduler=schedule)
        >>> rates = nestor.callbacks.LearningRate()
        >>> metrics = nestor.Engine(nestor.Program(net=level), callbacks=[rates], seed=0).run(1)
        >>> rates.metrics()
        {'net/lr': 0.125}
    """

    def __init__(self) -> None:
        self._run: Run | None = None

    def on_start(self, engine: Run) -> None:
        self._run = engine

    def metrics(self) -> dict[str, float]:
        states = self._run.states if self._run else {}
        optimizers = {name: state.level.problem.optimizer for name, state in states.items()}
        return {
            f"{name}/lr_{index}" if index else f"{name}/lr": float(group["lr"])
            for name, optimizer in optimizers.items()
            for index, group in enumerate(optimizer.param_groups if optimizer else ())
            if "lr" in group
        }


class Throughput(Callback):
    """Measure ``engine/steps_per_second`` and ``engine/seconds_per_step`` over the last engine steps.

    The rate is of wall-clock time, which includes validations and other callbacks. The callback does not synchronize
    with an accelerator. The rate is correct if the window is longer than the queue of the accelerator.

    Args:
        window: Number of engine steps to average over.

    Raises:
        ValueError: If ``window`` is not a positive integer.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> speed = nestor.callbacks.Throughput(window=10)
        >>> metrics = nestor.Engine(program, callbacks=[speed], seed=0).run(20)
        >>> sorted(speed.metrics())
        ['engine/seconds_per_step', 'engine/steps_per_second']
    """

    @typed
    def __init__(self, window: int = 50) -> None:
        self.window = window
        check_options(self, counts=["window"])
        self._times: deque[tuple[int, float]] = deque(maxlen=window + 1)

    @property
    def steps_per_second(self) -> float:
        """Engine steps per second; NaN before the first step."""
        if len(self._times) < 2:
            return float("nan")
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (last - first) / max(end - begin, 1e-12)

    def is_due(self, engine: Run, step: int) -> bool:
        # Never due: the rate over several compiled steps needs no time stamp between them.
        return False

    def on_start(self, engine: Run) -> None:
        self._times.clear()  # the rate excludes the time between two runs
        self.on_step(engine)

    def on_step(self, engine: Run) -> None:
        self._times.append((engine.step, time.perf_counter()))

    def metrics(self) -> dict[str, float]:
        rate = self.steps_per_second
        return {} if len(self._times) < 2 else {"engine/steps_per_second": rate, "engine/seconds_per_step": 1 / rate}
