"""Checkpoints, from which a killed run continues."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from nestor.errors import check_options, typed
from nestor.training import checkpoint_files
from nestor.training.callback import Callback
from nestor.training.run import Run


class Checkpoint(Callback):
    """Save the whole state of the run at regular intervals.

    A run that is killed and resumed ends bitwise equal to an uninterrupted run. Each checkpoint is a folder
    ``step-<n>`` in the format of ``torch.distributed.checkpoint``. It is written under a temporary name and renamed
    when it is complete. With several processes, the first one writes whole tensors, so that the run can be resumed on
    any number of processes. On SIGTERM (preemption) and SIGINT the engine finishes the present step, and the callback
    saves before the run ends with status 143 or ``KeyboardInterrupt``. List ``Checkpoint`` last: it saves the states of
    the other callbacks.

    Args:
        folder: The folder of the checkpoints.
        every: Engine steps between two checkpoints. The end of a run is saved too.
        keep: Number of checkpoints to keep; older ones are deleted.
        asynchronous: Whether a thread writes the files while the run continues. The state is copied first.

    Raises:
        ValueError: If ``every`` or ``keep`` is not positive.
    """

    @typed
    def __init__(
        self, folder: str | os.PathLike[str], *, every: int = 1_000, keep: int = 2, asynchronous: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.every, self.keep, self.asynchronous = every, keep, asynchronous
        check_options(self, counts=["every", "keep"])
        self._saved_step = -1
        self._writing: Future[None] | None = None

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None if there is none."""
        return next(reversed(checkpoint_files.complete(self.folder)), None)

    def is_due(self, engine: Run, step: int) -> bool:
        return step % self.every == 0

    def on_start(self, engine: Run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if engine.runtime.rank == 0:
            # A run that was killed while it saved leaves partial folders.
            for partial in self.folder.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        self._saved_step = engine.step

    def on_step(self, engine: Run) -> None:
        if engine.signal is not None:
            self.save(engine)
            self._wait()
        elif engine.step % self.every == 0:
            self.save(engine)

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        if error is None and self._saved_step != engine.step:
            self.save(engine)
        self._wait()

    def save(self, engine: Run) -> None:
        """Save the present state. All processes must call this method."""
        self._wait()
        state = engine.state_dict()
        self._saved_step = engine.step
        if engine.runtime.rank:
            return
        tensors, skeleton = checkpoint_files.split(state)
        target = self.folder / f"step-{engine.step:08d}"
        if not self.asynchronous:
            self._write(target, tensors, skeleton)
            return
        executor = ThreadPoolExecutor(max_workers=1)
        self._writing = executor.submit(self._write, target, tensors, skeleton)
        executor.shutdown(wait=False)

    def _write(self, target: Path, tensors: list[Tensor], skeleton: bytes) -> None:
        checkpoint_files.save(target, tensors, skeleton)
        for old in checkpoint_files.complete(self.folder)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _wait(self) -> None:
        """Wait until the last checkpoint is written; raise the exception of the thread that writes it, if any."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
