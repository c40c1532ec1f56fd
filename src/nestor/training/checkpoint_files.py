"""Checkpoint folders. Each contains one state of a run, in the format of ``torch.distributed.checkpoint``."""

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
    """Write the two parts of a state, which :func:`split` returns, to a folder.

    The function writes to ``<name>.partial`` and renames it at the end: a folder without the suffix is complete.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as write

    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {f"tensor-{index}": tensor for index, tensor in enumerate(tensors)}
    state["skeleton"] = torch.frombuffer(bytearray(skeleton), dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch warns that one process saves alone
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
        raise FileNotFoundError(
            f"resume={str(folder)!r} contains no checkpoint. Give a folder step-<n> that Checkpoint wrote."
        )
    entries: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch warns that one process loads alone
        read(state, checkpoint_id=folder, no_dist=True)
    skeleton = state.pop("skeleton").numpy().tobytes()
    return join([state[f"tensor-{index}"] for index in range(len(state))], skeleton)


def complete(parent: Path) -> list[Path]:
    """List the complete checkpoints in a folder, oldest first."""
    folders = [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def split(state: dict[str, Any]) -> tuple[list[Tensor], bytes]:
    """Split a state into its tensors, copied to the CPU, and a pickle of everything else.

    The pickle contains the index of each tensor in the list. A tensor that occurs several times is copied once.
    """
    tensors: list[Tensor] = []
    # Keep the originals alive: a tensor that is freed while pickling could give its id to another one.
    seen: dict[int, tuple[int, Tensor]] = {}

    def identify(item: Any) -> tuple[int, tuple[int, ...]] | None:
        if not isinstance(item, Tensor) or item.layout is not torch.strided:
            return None
        index, _ = seen.setdefault(id(item), (len(tensors), item))
        if index == len(tensors):
            tensors.append(item.detach().to("cpu", copy=True).contiguous())
        # torch chooses kernels by the strides: another order in memory would change the last bits of a resumed run.
        return index, tuple(item.stride()) if _is_dense(item) else ()

    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.persistent_id = identify  # type: ignore[method-assign]
    pickler.dump(state)
    return tensors, buffer.getvalue()


def join(tensors: list[Tensor], skeleton: bytes) -> dict[str, Any]:
    """Rebuild the state that :func:`split` has split."""
    tensors = list(tensors)

    def find(pid: tuple[int, tuple[int, ...]]) -> Tensor:
        index, stride = pid
        tensor = tensors[index]
        if stride and tensor.stride() != stride:
            tensors[index] = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
        return tensors[index]

    unpickler = pickle.Unpickler(io.BytesIO(skeleton))
    unpickler.persistent_load = find  # type: ignore[method-assign]
    state: dict[str, Any] = unpickler.load()
    return state


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill one contiguous block of memory, in any order of the dimensions."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and last == tensor.numel() - 1
