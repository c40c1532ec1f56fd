"""Checkpoints: a run that survives being killed."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestor.callbacks.callback import Callback

if TYPE_CHECKING:
    from nestor.engine import Engine

_NAME = re.compile(r"step-(\d+)")


class Checkpoint(Callback):
    """Save the whole state of a run now and then, so that it can be killed at any instant and go on bit for bit.

    Each checkpoint is a folder ``step-<n>`` in the format of ``torch.distributed.checkpoint``. It is written under
    another name and renamed when it is complete, so what bears the name is whole. Writing goes on beside the run; a
    copy of the state is taken first. Of several processes the first one writes, whole tensors, so that a run goes on
    with any number of them. On SIGTERM (preemption) the engine finishes its step, saves, and the process exits with
    status 143. List it after callbacks that log, stop or keep something: their state is saved with it.

    Args:
        folder: Where the checkpoints are.
        every: Engine steps between two of them; the end of a run is saved too.
        keep: How many to keep; older ones are deleted.
        asynchronous: Whether to write beside the run.

    Raises:
        ValueError: If ``every`` or ``keep`` is not positive.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, every: int = 1_000, keep: int = 2, asynchronous: bool = True
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"Checkpoint(every={every}, keep={keep}) must be at least 1.")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.asynchronous = asynchronous
        self._saved = -1
        self._terminated = False
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._handler: Any = None

    def latest(self) -> Path | None:
        """Find the newest complete checkpoint."""
        found = self._complete()
        return found[-1] if found else None

    def on_start(self, engine: Engine) -> None:
        """Clear what a killed run left half written, and listen for SIGTERM."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if engine.runtime.rank == 0:
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._saved = engine.step
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)

    def looks_at(self, engine: Engine, step: int) -> bool:
        """When it is due."""
        return step % self.every == 0

    def on_step(self, engine: Engine) -> None:
        """Save when it is time, or when the process is to end."""
        if engine.runtime.any(self._terminated):
            self.save(engine)
            self._wait()
            raise SystemExit(143)
        if engine.step % self.every == 0:
            self.save(engine)

    def on_end(self, engine: Engine, error: BaseException | None) -> None:
        """Save the end of a run that ended well, and wait until all is written."""
        if error is None and self._saved != engine.step:
            self.save(engine)
        self._wait()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def save(self, engine: Engine) -> None:
        """Save the present state."""
        self._wait()
        state = engine.state_dict()
        if engine.runtime.rank:
            self._saved = engine.step
            return  # the first process writes for all
        tensors, skeleton = split(state)
        self._saved = engine.step
        target = self.folder / f"step-{engine.step:08d}"
        if not self.asynchronous:
            self._write(tensors, skeleton, target)
            return
        self._writer = threading.Thread(target=self._try_write, args=(tensors, skeleton, target), daemon=False)
        self._writer.start()

    def _try_write(self, tensors: list[Tensor], skeleton: bytes, target: Path) -> None:
        try:
            self._write(tensors, skeleton, target)
        except BaseException as error:  # raised in the run at the next save
            self._failure = error

    def _write(self, tensors: list[Tensor], skeleton: bytes, target: Path) -> None:

        from torch.distributed.checkpoint.state_dict_saver import save

        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        state: dict[str, Any] = {f"tensor-{index}": tensor for index, tensor in enumerate(tensors)}
        state["skeleton"] = torch.frombuffer(bytearray(skeleton), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a single process saves alone
            save(state, checkpoint_id=partial, no_dist=True)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _complete(self) -> list[Path]:
        folders = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(folders, key=lambda path: int(path.name.split("-")[1]))

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True


def load(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; ``engine.load_state_dict`` takes it.

    It is data that was pickled: read only what you trust.

    Raises:
        FileNotFoundError: If there is no checkpoint in the folder.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    folder = Path(folder)
    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint: a folder named step-<n>, as Checkpoint writes them.")
    entries: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        read(state, checkpoint_id=folder, no_dist=True)
    skeleton = state.pop("skeleton").numpy().tobytes()
    return join([state[f"tensor-{index}"] for index in range(len(state))], skeleton)


def split(state: dict[str, Any]) -> tuple[list[Tensor], bytes]:
    """Take the tensors out of a state, as copies on the CPU, and pickle the rest."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(state)
    return pickler.tensors, buffer.getvalue()


def join(tensors: list[Tensor], skeleton: bytes) -> dict[str, Any]:
    """Put tensors back into a state."""
    unpickler = _Unpickler(io.BytesIO(skeleton))
    unpickler.tensors = tensors
    state: dict[str, Any] = unpickler.load()
    return state


class _Pickler(pickle.Pickler):
    """Writes tensors down by number, each once, wherever they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def persistent_id(self, item: Any) -> tuple[int, tuple[int, ...]] | None:
        if not isinstance(item, Tensor) or item.layout is not torch.strided:
            return None
        if id(item) not in self._places:
            self._places[id(item)] = len(self.tensors)
            self._alive.append(item)
            self.tensors.append(item.detach().to("cpu", copy=True).contiguous())
        # The order of the elements in memory decides which kernels run, and so the last bits.
        return self._places[id(item)], tuple(item.stride()) if _is_dense(item) else ()


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, pid: tuple[int, tuple[int, ...]]) -> Tensor:
        place, stride = pid
        tensor = self.tensors[place]
        if stride and tensor.stride() != stride:
            tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
            self.tensors[place] = tensor
        return tensor


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in some order."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last == tensor.numel() - 1
