"""Files of trained modules that other libraries read: safetensors, and the folders of ``from_pretrained``."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nestor.checkpoints.durable import flush
from nestor.distributed import Runtime
from nestor.levels.level import Level


@runtime_checkable
class Pretrained(Protocol):
    """A module of transformers or peft, which writes the folder that its ``from_pretrained`` reads."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the folder."""


def check_weights(levels: Iterable[Level], runtime: Runtime) -> None:
    """Check that safetensors can hold the modules of levels; all processes must call this function.

    Raises:
        ValueError: If a module's state contains something else than dense tensors of types that safetensors knows.
    """
    from safetensors.torch import save

    with runtime.whole_modules():
        entries = [(level, *entry) for level in levels for entry in level.problem.module.state_dict().items()]
        for level, name, value in entries:
            try:
                save({name: value[:0].clone() if _is_dense(value) and value.dim() else value})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"Level {level.name!r}: safetensors cannot hold {name!r} of its module's state_dict ({error}). "
                    "Leave the level out (levels=...), or keep its weights with nestor.callbacks.Checkpoint."
                ) from None


def write_weights(folder: Path, levels: Mapping[str, Level], runtime: Runtime) -> None:
    """Write the modules of levels; all processes must call this function, and the first one writes.

    ``<level>.safetensors`` contains the module's ``state_dict``: all names, so tied weights are written under each of
    theirs. The variables of a level with tasks are stacked. A module with ``save_pretrained`` also gets the folder
    ``<level>``. A file or folder that exists is replaced when the new one is complete.
    """
    stacked = {
        name: dict(zip(level.names, level.gather(level.parameters), strict=True))
        for name, level in levels.items()
        if level.problem.tasks is not None
    }
    with runtime.whole_modules():
        if runtime.rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, level in levels.items():
            module = level.problem.module
            _write_file(folder / f"{name}.safetensors", module.state_dict() | stacked.get(name, {}))
            if isinstance(module, Pretrained) and name not in stacked:
                _write_folder(folder / name, module)
        flush(folder)


def _write_file(target: Path, state: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # Copies: safetensors refuses tensors that share memory, and load_state_dict(strict=True) needs all names.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    flush(partial)
    partial.replace(target)


def _write_folder(target: Path, module: Pretrained) -> None:
    partial, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    module.save_pretrained(str(partial))
    for path in (*partial.rglob("*"), partial):
        flush(path)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)  # a folder with files cannot be replaced
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided
