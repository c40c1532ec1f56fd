"""The beginning and the end of a run: what processes agree on, signals, errors."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from torch.utils.data import get_worker_info

from nestor.data.run_generators import RunGenerators
from nestor.data.workers import workers_of
from nestor.errors import NestorWarning
from nestor.training.callback import Callback
from nestor.training.observers import call
from nestor.training.run import Run

# Seconds between two steps at which processes ask each other for signals, unless a step takes longer.
INTERVAL = 0.1
# Steps between them at most.
LONGEST = 1_000
# As integers: the module converts members of its enumerations at every call.
_ENDING = int(signal.SIGTERM), int(signal.SIGINT)


class _Asked(NamedTuple):
    """The last time at which processes asked each other for signals: the step, and the next step at which they do."""

    step: int
    next_step: int
    time: float


class Signals:
    """Ends a run after the engine step in which SIGTERM or SIGINT arrives: a context, entered once for each run.

    A run in a thread other than the main one receives no signals, and installs no handlers. A signal that the program
    ignores stays ignored. A handler that the program has installed is restored when the run ends; one of its own is
    then called, if its signal ended the run. A second SIGINT raises ``KeyboardInterrupt`` at once.

    Args:
        data: What the levels draw from; the workers of loaders outlive the signals until the run has ended.

    Attributes:
        agreed: The number of the signal that ends the run after the present step, equal in all processes; None if no
            process had received one at the end of the last step.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.agreed: int | None = None
        self.workers = workers_of(data)
        self._received: int | None = None
        self._old: dict[int, Any] = {}
        self._old_children: Any = None
        self._process: int | None = None
        self._asked: _Asked | None = None

    def __enter__(self) -> Self:
        self.agreed = self._received = self._asked = None
        self._old = {}
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                old = signal.getsignal(number)
                # None is a handler of another language, which Python cannot restore.
                if old is not None and old != signal.SIG_IGN:
                    self._old[number] = old
                    signal.signal(number, self._catch)
        self.workers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.workers.__exit__(kind, error, traceback)
        self._process = None
        for number, old in self._old.items():
            present = signal.signal(number, old)
            if present != self._catch:  # a handler that was installed during the run stays
                signal.signal(number, present)
        received = self._received
        if received is None:
            return
        if SIGCHLD is not None and signal.getsignal(SIGCHLD) == self._ignore_children:
            signal.signal(SIGCHLD, self._old_children)
        old = self._old.get(received)
        if callable(old) and old is not signal.default_int_handler:
            old(received, None)
        if error is None:
            raise _ending(received)
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            error.add_note(f"[{signal.Signals(received).name} was received before the error]")

    def agree(self, run: Run) -> None:
        """Set ``agreed``; all processes call the method at the beginning, after each engine step, and at the end.

        With several processes this is a collective, which is not called at every step of a fast run.
        """
        runtime, step = run.runtime, run.step
        if runtime.size == 1:
            self.agreed = self._received
            return
        if self._asked is not None and self._asked.step < step < min(self._asked.next_step, run.last_step):
            return
        now, every = time.monotonic(), 1
        if self._asked is not None and step > self._asked.step:
            every = int(INTERVAL * (step - self._asked.step) / max(now - self._asked.time, 1e-6))
        flags = [float(self._received is not None), float(self._received == signal.SIGTERM)]
        received, terminated, mean = runtime.mean([*flags, float(max(1, min(every, LONGEST)))])
        self._asked = _Asked(step, step + int(mean), now)
        if received > 0:
            self.agreed = self._received = signal.SIGTERM if terminated > 0 else signal.SIGINT

    def end_run(self) -> None:
        """Raise the exception that ends the run, if a signal does.

        Raises:
            SystemExit: With status 143, for SIGTERM.
            KeyboardInterrupt: For SIGINT.
        """
        if self.agreed is not None:
            raise _ending(self.agreed)

    def reason(self, error: BaseException) -> BaseException:
        """Return the exception that ends the run: that of a signal, if ``error`` says that it killed loader workers."""
        if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker (pid"):
            return error
        deadline = time.monotonic() + 1
        while self._old and self._received is None and time.monotonic() < deadline:
            time.sleep(0.05)  # whoever signals all processes may begin with the workers
        if self._received is None:
            return error
        warnings.warn(
            f"{signal.Signals(self._received).name} ended the workers of a loader in the middle of a step, which is "
            "not saved: the last checkpoint is the newest one. Give Problem(data=...) the DataLoader itself, so that "
            "its workers outlive the step.",
            NestorWarning,
            stacklevel=4,
        )
        return _ending(self._received)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._pass_on(number, frame)
            return
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        if self._received is None:
            self._received = number
            if SIGCHLD is not None:
                # torch raises an error at once, in the middle of the step, when a worker dies.
                self._old_children = signal.signal(SIGCHLD, self._ignore_children)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Do what the program would do without the run: after the run, and in processes that it has forked."""
        old = self._old[number]
        if number == signal.SIGINT and get_worker_info() is not None:
            return  # the process that loads ends its workers
        if callable(old):
            old(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _ignore_children(self, number: int, frame: FrameType | None) -> None:
        """Do nothing: a loader without workers says so at the next batch."""


class RunProcess(NamedTuple):
    """What a run changes in its process and restores: random generators, and handlers of signals."""

    generators: RunGenerators
    signals: Signals


def check_steps(steps: int) -> None:
    """Check the argument of ``Engine.run``.

    Raises:
        ValueError: If it is no positive integer.
    """
    if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"Engine.run(steps={steps!r}) must be a positive integer.")


def compare_runs(run: Run, steps: int, checkpoint: Path | None) -> None:
    """Check that all processes begin the same run.

    Raises:
        ProcessError: If a process differs or does not arrive; it names the process and the difference.
    """
    if run.runtime.size > 1:
        name = None if checkpoint is None else checkpoint.name
        run.runtime.compare("engine.run", {"steps": steps, "engine.step": run.step, "checkpoint": name})


@contextmanager
def ending(run: Run, signals: Signals, callbacks: Iterable[Callback]) -> Iterator[None]:
    """End a run: write the variables to the modules, then call ``on_end`` of every callback, even if one raises.

    An error that ended the run is not replaced by errors of callbacks, which become its notes. The exit of a process
    has no traceback, so that they become warnings too.

    Raises:
        BaseException: What ended the run; if nothing did, the first error of a callback, with the later ones as notes.
    """
    error: BaseException | None = None
    try:
        yield
        if run.runtime.holds_variables:
            run.runtime.end()
    except BaseException as caught:
        error = signals.reason(caught)
        try:
            run.runtime.end_after(error)
        except RuntimeError as own:
            error.add_note(f"The modules do not hold the variables: {own}")
    first = error
    for callback in callbacks:
        if callback.only_first and run.runtime.rank:
            continue
        try:
            call(callback, "on_end", run, (error,))
        except BaseException as own:
            text = f"on_end of {type(callback).__name__} raised {type(own).__name__}: {own}"
            if first is None:
                first = own
                continue
            first.add_note(text)
            if isinstance(error, SystemExit):
                warnings.warn(text, NestorWarning, stacklevel=4)
    if first is not None:
        raise first


# Windows has no such signal.
SIGCHLD: int | None = getattr(signal, "SIGCHLD", None)


def _ending(number: int) -> BaseException:
    return SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt()
