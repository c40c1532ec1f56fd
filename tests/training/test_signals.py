"""SIGTERM, SIGINT and errors of callbacks: how a run ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nestor
from nestor.callbacks import Callback, Checkpoint

SCRIPT = Path(__file__).parent / "signalled.py"


@pytest.fixture(autouse=True)
def _same_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    yield
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]


class During(Callback):
    """Calls a function at an event, at one step."""

    def __init__(self, event: str, step: int, action: Callable[[], object]) -> None:
        self.event, self.step, self.action = event, step, action
        self.ended: list[BaseException | None] = []

    def _at(self, event: str, step: int) -> None:
        if event == self.event and step == self.step:
            self.action()

    def on_start(self, engine: Any) -> None:
        self._at("start", engine.step)

    def on_level_step(self, engine: Any, level: str) -> None:
        self._at("middle", engine.step + 1)

    def on_step(self, engine: Any) -> None:
        self._at("step", engine.step)

    def on_end(self, engine: Any, error: BaseException | None) -> None:
        self.ended.append(error)
        self._at("end", engine.step)


def engine(*callbacks: Callback) -> nestor.Engine:
    net = nn.Linear(2, 1)
    problem = nestor.Problem(
        net,
        lambda batch, net: net(batch).square().mean(),
        data=[torch.ones(4, 2)],
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )
    return nestor.Engine(nestor.Program(net=problem), seed=0, callbacks=callbacks)


def send(*numbers: int) -> Callable[[], None]:
    return lambda: [signal.raise_signal(number) for number in numbers] and None


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("event", ["middle", "step"])
def test_term_with_two_checkpoints(event: str, tmp_path: Path) -> None:
    """Each saves the step in which the signal came; that after which it came is followed by one more step."""
    first, second = Checkpoint(tmp_path / "a", every=100), Checkpoint(tmp_path / "b", every=2)
    run = engine(During(event, 3, send(signal.SIGTERM)), first, second)
    with pytest.raises(SystemExit) as caught:
        run.run(10)
    last = 3 if event == "middle" else 4
    assert caught.value.code == 143
    assert run.step == last
    assert names(tmp_path / "a") == [f"step-{last:08d}"]
    assert names(tmp_path / "b")[-1] == f"step-{last:08d}"


def test_interrupt_ends_after_the_step(tmp_path: Path) -> None:
    run = engine(During("middle", 3, send(signal.SIGINT)), Checkpoint(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run.run(10)
    assert names(tmp_path) == ["step-00000003"]
    assert run.run(10)  # a further run begins without the signal
    assert run.step == 13


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    run = engine(During("middle", 3, send(signal.SIGINT, signal.SIGINT)), Checkpoint(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run.run(10)
    assert run.step == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize(("event", "step"), [("start", 0), ("step", 5), ("end", 5)])
def test_no_signal_is_lost(event: str, step: int) -> None:
    """Before the first step, after the last one, and while callbacks end."""
    observer = During(event, step, send(signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        engine(observer).run(5)
    assert caught.value.code == 143
    assert len(observer.ended) == 1


@pytest.mark.parametrize("old", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None])
@pytest.mark.parametrize("event", ["never", "start", "middle", "end"])
def test_old_handlers_are_restored(old: Any, event: str) -> None:
    """After a run, and after one that fails; a signal that the program ignores ends no run."""
    before = signal.signal(signal.SIGTERM, old)
    try:
        observer = During(event, 1 if event == "middle" else 0 if event == "start" else 2, fail(OSError("own")))
        try:
            engine(observer, During("step", 1, send(signal.SIGTERM)) if old == signal.SIG_IGN else Callback()).run(2)
        except OSError:
            assert event != "never"
        assert signal.getsignal(signal.SIGTERM) is old
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_of_other_languages_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sees None, and could not restore them."""
    replaced = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: replaced.append(arguments))
    engine().run(2)
    assert not replaced


def test_own_handler_is_called_when_the_run_has_ended(tmp_path: Path) -> None:
    """After the checkpoint, and then the run ends as without it."""
    seen: list[list[str]] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(names(tmp_path)))
    try:
        with pytest.raises(SystemExit):
            engine(During("middle", 3, send(signal.SIGTERM)), Checkpoint(tmp_path)).run(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [["step-00000003"]]


def test_other_threads_have_no_handlers() -> None:
    found: list[Any] = []
    observer = During("middle", 1, lambda: found.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=lambda: found.append(engine(observer).run(2)["net/loss"]))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found[0] == before
    assert len(found) == 2


def test_run_within_a_run(tmp_path: Path) -> None:
    """The inner one ends after its step, and the outer one with it; without a signal both go on."""
    inner = engine(During("middle", 12, send(signal.SIGTERM)), Checkpoint(tmp_path))
    outer = engine(During("step", 1, lambda: inner.run(10)), During("step", 2, lambda: inner.run(10)))
    with pytest.raises(SystemExit) as caught:
        outer.run(5)
    assert caught.value.code == 143
    assert (outer.step, inner.step) == (2, 12)
    assert names(tmp_path)[-1] == "step-00000012"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_forked_processes_die_as_before() -> None:
    """A process that the program forks during the run does not take the signal for the run's."""
    context = multiprocessing.get_context("fork")
    running = context.Event()
    process = context.Process(target=lambda: (running.set(), time.sleep(60)))

    def end() -> None:
        process.start()
        running.wait(30)
        process.terminate()
        process.join(30)

    engine(During("step", 1, end)).run(2)
    assert process.exitcode == -signal.SIGTERM


def test_every_callback_ends() -> None:
    """The first error is raised, with the second as its note."""
    observers = [During("end", 2, fail(OSError("one"))), During("end", 2, fail(ValueError("two"))), During("", 0, list)]
    with pytest.raises(OSError, match="one") as caught:
        engine(*observers).run(2)
    assert all(observer.ended == [None] for observer in observers)
    assert any("ValueError: two" in note for note in caught.value.__notes__)


def test_no_error_of_an_ending_hides_that_of_the_run(tmp_path: Path) -> None:
    """R7: a callback that raises in on_end; the checkpoint that is being written is complete."""
    first = During("end", 3, fail(OSError("one")))
    run = engine(During("step", 3, fail(ZeroDivisionError("run"))), first, Checkpoint(tmp_path, every=2))
    with pytest.raises(ZeroDivisionError) as caught:
        run.run(5)
    assert any("on_end of During raised OSError: one" in note for note in caught.value.__notes__)
    assert names(tmp_path) == ["step-00000002"]


def test_ending_of_a_run_whose_callback_fails_to_end(tmp_path: Path) -> None:
    """The last checkpoint is saved all the same; an exit has no traceback, so the error becomes a warning."""
    with pytest.raises(OSError, match="one"):
        engine(During("end", 3, fail(OSError("one"))), Checkpoint(tmp_path / "a")).run(3)
    assert names(tmp_path / "a") == ["step-00000003"]
    both = [During("middle", 3, send(signal.SIGTERM)), During("end", 3, fail(OSError("one")))]
    with pytest.warns(nestor.NestorWarning, match="on_end of During raised OSError: one"), pytest.raises(SystemExit):
        engine(*both, Checkpoint(tmp_path / "b")).run(5)
    assert names(tmp_path / "b") == ["step-00000003"]


def test_an_error_is_not_replaced_by_a_signal() -> None:
    def both() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        engine(During("middle", 2, both)).run(5)
    assert any("SIGTERM was received" in note for note in caught.value.__notes__)


def test_a_failing_save_is_the_error_of_a_signalled_run(tmp_path: Path) -> None:
    """Status 143 would say that the run was saved."""
    saver = Checkpoint(tmp_path / "folder")
    remove = During("middle", 3, lambda: [(tmp_path / "folder").rmdir(), (tmp_path / "folder").touch()])
    with pytest.raises(BaseException, match="folder") as caught:
        engine(remove, During("middle", 3, send(signal.SIGTERM)), saver).run(5)
    assert not isinstance(caught.value, SystemExit)


def is_gone(group: int) -> bool:
    begin = time.time()
    while time.time() - begin < 20:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [
        ("plain", signal.SIGTERM, 143),
        ("kept", signal.SIGINT, -signal.SIGINT),
        ("spawn", signal.SIGTERM, 143),
        ("generator", signal.SIGTERM, 143),
    ],
)
def test_signal_to_the_group(kind: str, number: int, status: int, tmp_path: Path) -> None:
    """Workers of two loaders are signalled too: the last whole step is saved, and no process is left."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path / "run"), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    begin = time.time()
    while time.time() - begin < 90 and not list(tmp_path.glob("run/step-*0")):
        time.sleep(0.05)
    before = max(map(Path.stat, tmp_path.glob("run/step-*0")), key=lambda found: found.st_mtime).st_mtime
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error.decode()
    newest = Checkpoint(tmp_path / "run").latest()
    assert newest is not None
    assert newest.stat().st_mtime > before
    assert "DataLoader" not in error.decode()
    assert is_gone(process.pid)
