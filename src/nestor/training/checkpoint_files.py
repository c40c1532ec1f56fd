"""Checkpoint folders: one state of a run each, in the format of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"step-(\d+)")


def save(folder: Path, tensors: list[Tensor], skeleton: bytes) -> None:
    """Write the parts of a state, as :func:`split` returns them, to a folder.

    The folder is written as ``<name>.partial`` and renamed at the end: a folder without the suffix is complete.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as write

    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {f"tensor-{index}": tensor for index, tensor in enumerate(tensors)}
    state["skeleton"] = torch.frombuffer(bytearray(skeleton), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that one process saves alone
        write(state, checkpoint_id=partial, no_dist=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, for ``engine.load_state_dict``.

    A checkpoint contains pickled data: read only checkpoints that you trust.

    Raises:
        FileNotFoundError: If the folder contains no checkpoint.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    folder = Path(folder)
    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"{folder} contains no checkpoint. Give a folder step-<n> that Checkpoint has written.")
    entries: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that one process loads alone
        read(state, checkpoint_id=folder, no_dist=True)
    skeleton = state.pop("skeleton").numpy().tobytes()
    return join([state[f"tensor-{index}"] for index in range(len(state))], skeleton)


def complete(parent: Path) -> list[Path]:
    """List the complete checkpoints in a folder, oldest first."""
    folders = [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def split(state: dict[str, Any]) -> tuple[list[Tensor], bytes]:
    """Split a state into its tensors, copied to the CPU, and a pickle of everything else."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(state)
    return pickler.tensors, buffer.getvalue()


def join(tensors: list[Tensor], skeleton: bytes) -> dict[str, Any]:
    """Rebuild the state that :func:`split` has split."""
    unpickler = _Unpickler(io.BytesIO(skeleton))
    unpickler.tensors = tensors
    state: dict[str, Any] = unpickler.load()
    return state


class _Pickler(pickle.Pickler):
    """Collects the tensors of an object and pickles their indices in the list; a shared tensor is collected once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._indices: dict[int, int] = {}
        # A tensor that is freed while pickling could give its id to another one.
        self._alive: list[Tensor] = []

    def persistent_id(self, item: Any) -> tuple[int, tuple[int, ...]] | None:
        if not isinstance(item, Tensor) or item.layout is not torch.strided:
            return None
        if id(item) not in self._indices:
            self._indices[id(item)] = len(self.tensors)
            self._alive.append(item)
            self.tensors.append(item.detach().to("cpu", copy=True).contiguous())
        # torch chooses kernels by the strides: another order in memory would change the last bits of a resumed run.
        return self._indices[id(item)], tuple(item.stride()) if _is_dense(item) else ()


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, pid: tuple[int, tuple[int, ...]]) -> Tensor:
        index, stride = pid
        tensor = self.tensors[index]
        if stride and tensor.stride() != stride:
            tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
            self.tensors[index] = tensor
        return tensor


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill one contiguous block of memory, in any order of the dimensions."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last == tensor.numel() - 1
