"""Checkpoints, from which a killed run continues."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nestor.checkpoints.folder import Packed, clean, complete, newest_whole, pack, prune, save
from nestor.errors import CheckpointError
from nestor.errors.options import check_options, typed
from nestor.training.callback import Callback
from nestor.training.run import Run


class Checkpoint(Callback):
    """Save the whole state of the run at regular intervals.

    A run that is killed and resumed ends bitwise equal to an uninterrupted run. Each checkpoint is a folder
    ``step-<n>`` with tensors in safetensors files, everything else in JSON, and a manifest with a checksum for each
    file; it contains no pickle. :func:`nestor.load_checkpoint` reads it, ``nestor inspect`` shows it. It is written
    under a temporary name, flushed to the disk, and renamed when it is complete. With several processes, the first one
    writes whole tensors, so that the run can be resumed on any number of processes. On SIGTERM (preemption) the engine
    finishes the present step, saves, and exits with status 143. List ``Checkpoint`` last: it saves the states of the
    other callbacks.

    Args:
        folder: The folder of the checkpoints.
        every: Engine steps between two checkpoints. The end of a run is saved too.
        keep: Number of checkpoints of this run to keep; older ones are deleted. Those of other runs are never deleted.
        asynchronous: Whether a thread writes the files while the run continues. The state is copied first. An error of
            the thread ends the run at the next step.
        overwrite: Whether a run that is not resumed may start in a folder that contains checkpoints. They stay, unless
            the new run saves at the same step; ``resume="latest"`` then continues the run that saved last.

    Raises:
        ValueError: If ``every`` or ``keep`` is not positive.
        CheckpointError: At the start of a run that is not resumed, if the folder contains checkpoints; at a save, if
            the state contains objects that a file without code cannot hold (see :func:`nestor.register_batch`), or
            the disk has too little space. Older checkpoints stay whole.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> engine = nestor.Engine(program, callbacks=[nestor.callbacks.Checkpoint("runs/one", every=2)], seed=0)
        >>> metrics = engine.run(4, resume="latest")  # the same line starts the run and continues it
        >>> import os
        >>> sorted(os.listdir("runs/one"))
        ['step-00000002', 'step-00000004']
    """

    @typed
    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1_000,
        keep: int = 2,
        asynchronous: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.every, self.keep, self.asynchronous, self.overwrite = every, keep, asynchronous, overwrite
        check_options(self, counts=["every", "keep"])
        self._saved_step = -1
        self._writing: Future[None] | None = None

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint, or None if there is none; damaged ones are skipped, with a warning.

        Raises:
            CheckpointError: If there are checkpoints, but none is whole.
        """
        return newest_whole(self.folder)

    def is_due(self, engine: Run, step: int) -> bool:
        return step % self.every == 0

    def on_start(self, engine: Run) -> None:
        # The first process writes; all processes end if it cannot.
        problem = self._prepare(engine) if engine.runtime.rank == 0 else ""
        if engine.runtime.any(bool(problem)):
            raise CheckpointError(
                f"Checkpoint({str(self.folder)!r}): {problem or 'the first process cannot save to the folder.'}"
            )
        self._saved_step = engine.step

    def _prepare(self, engine: Run) -> str:
        """Make the folder, and remove what a killed run has left; return why the run cannot save to it, if so."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)
            is_used = engine.step == 0 and not engine.is_resuming and bool(complete(self.folder))
            if not os.access(self.folder, os.W_OK):
                return "the folder cannot be written to."
        except OSError as error:
            return f"the folder cannot be made: {error}."
        if is_used and not self.overwrite:
            return (
                "the folder contains checkpoints of another run. Continue that run with "
                "engine.run(steps, resume='latest'), or give another folder, or start anew beside them: "
                "Checkpoint(..., overwrite=True)."
            )
        return ""

    def on_step(self, engine: Run) -> None:
        if self._writing is not None and self._writing.done():
            self._wait()
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
        packed = pack(state)
        if (free := shutil.disk_usage(self.folder).free) < packed.size:
            raise CheckpointError(
                f"Checkpoint({str(self.folder)!r}): the disk has {free:,} bytes left, the checkpoint needs "
                f"{packed.size:,}. Older checkpoints are whole. Free space, or use a smaller keep=."
            )
        if not self.asynchronous:
            self._write(packed)
            return
        executor = ThreadPoolExecutor(max_workers=1)
        self._writing = executor.submit(self._write, packed)
        executor.shutdown(wait=False)

    def _write(self, packed: Packed) -> None:
        save(self.folder, packed)
        prune(self.folder, packed.run, self.keep)

    def _wait(self) -> None:
        """Wait until the last checkpoint is written; raise the exception of the thread that writes it, if any."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
