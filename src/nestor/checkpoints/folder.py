"""Folders of checkpoints: one state each, written completely or not at all."""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.checkpoints.durable import flush
from nestor.checkpoints.encoding import Json, decode, encode
from nestor.checkpoints.manifest import FormatVersionError, Manifest, check_files, read_manifest, write_manifest
from nestor.checkpoints.tensor_files import read_tensors, write_tensors
from nestor.errors import CheckpointError, NestorWarning
from nestor.errors.options import typed
from nestor.version import __version__

_NAME = re.compile(r"step-(\d+)")
_STATE_FILE, _PARTIAL, _REPLACED = "state.json", ".partial", ".replaced"


class Packed(NamedTuple):
    """A state that is ready to be written: a copy, so that the run may go on.

    Attributes:
        state: Everything but large tensors and the description of the program, as JSON.
        tensors: The tensors.
        program: The description of the program.
        run: The id of the run.
        step: The engine step.
    """

    state: Json
    tensors: dict[str, Tensor]
    program: dict[str, Any]
    run: str
    step: int

    @property
    def size(self) -> int:
        """The bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def pack(state: Mapping[str, Any]) -> Packed:
    """Copy a state that an engine has returned.

    Raises:
        CheckpointError: If the state contains values that no file without code can hold.
    """
    tree, tensors = encode({name: value for name, value in state.items() if name != "program"})
    return Packed(tree, tensors, state["program"], state["run"], state["step"])


def unpack(packed: Packed) -> dict[str, Any]:
    """Return the state that :func:`pack` has copied, through the text that a file would contain."""
    return {**decode(json.loads(_text(packed.state)), packed.tensors), "program": packed.program}


def save(parent: Path, packed: Packed) -> Path:
    """Write a checkpoint to ``parent/step-<n>``, and return its folder.

    The files are written to ``step-<n>.partial`` and flushed to the disk; then the folder is renamed. If anything
    fails, the partial folder is removed, and older checkpoints are as before.

    Raises:
        CheckpointError: If the files cannot be written, for example because the disk is full.
    """
    folder = parent / f"step-{packed.step:08d}"
    partial = folder.with_suffix(_PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(partial, packed.tensors)
        (partial / _STATE_FILE).write_text(_text(packed.state), encoding="utf-8")
        versions = {"nestor": __version__, "torch": torch.__version__}
        write_manifest(
            partial, versions=versions, run=packed.run, step=packed.step, saved=time.time(), program=packed.program
        )
        for path in partial.iterdir():
            shutil.copymode(partial / _STATE_FILE, path)  # safetensors makes files that their owner alone may read
            flush(path)
        flush(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"The checkpoint {folder} cannot be written: {error}. Older checkpoints are whole.", step=packed.step
            ) from error
        raise
    replaced = folder.with_suffix(_REPLACED)
    if folder.exists():  # from a run that was at this step before; rename replaces no folder that contains files
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    flush(parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def clean(parent: Path) -> None:
    """Remove what a run has left that was killed while it saved."""
    for replaced in parent.glob(f"*{_REPLACED}"):
        folder = replaced.with_suffix("")
        if not folder.exists():  # killed between the two renames
            replaced.rename(folder)
    for left in (*parent.glob(f"*{_PARTIAL}"), *parent.glob(f"*{_REPLACED}")):
        shutil.rmtree(left, ignore_errors=True)


@typed
def load_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, for :meth:`nestor.Engine.load_state_dict`.

    Every file is compared with its checksum first. No code of the checkpoint runs: tensors are read from safetensors,
    everything else from JSON.

    Args:
        folder: The folder of one checkpoint; or the folder of a run, of which the newest whole checkpoint is read.

    Returns:
        The state, with its tensors on the CPU.

    Raises:
        FileNotFoundError: If the folder contains no checkpoint.
        CheckpointError: If the checkpoint is damaged, or of another version of the format, or contains batches of a
            class that this process has not imported; see :func:`nestor.register_batch`.

    Example:
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> engine = nestor.Engine(program, callbacks=[nestor.callbacks.Checkpoint("run")], seed=0)
        >>> metrics = engine.run(1)
        >>> state = nestor.load_checkpoint("run")
        >>> state["modules"]["net"]["parameters"]["value"]
        tensor([0.5000, 0.5000])
        >>> engine.load_state_dict(state)
    """
    path = Path(folder)
    if (newest := newest_whole(path)) is not None:
        path, manifest = newest, read_manifest(newest)
    else:
        manifest = read_manifest(path)
        check_files(path, manifest)
    try:
        tree = json.loads((path / _STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {_STATE_FILE} cannot be read.") from error
    state = decode(tree, read_tensors(path))
    if not isinstance(state, dict):
        raise CheckpointError(f"The checkpoint {path} is damaged: {_STATE_FILE} contains no state.")
    return {**state, "program": manifest.program}


def complete(parent: Path) -> list[Path]:
    """List the checkpoints of a folder by their steps; those that are not whole too, but no partial ones."""
    folders = [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name)] if parent.is_dir() else []
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def newest_whole(parent: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is whole; None if the folder has no checkpoint at all.

    If runs share the folder, it is a checkpoint of the run that has saved last. Damaged ones are skipped, with a
    warning for each.

    Raises:
        CheckpointError: If there are checkpoints, but none is whole; or if one is of another version of the format.
    """
    found: list[tuple[Path, Manifest]] = []
    damaged: list[str] = []
    for path in complete(parent):
        try:
            found.append((path, read_manifest(path)))
        except (FileNotFoundError, NotADirectoryError) as error:
            damaged.append(str(error))
        except FormatVersionError:
            raise
        except CheckpointError as error:
            damaged.append(error.message)
    last = {manifest.run: manifest.saved for _, manifest in sorted(found, key=lambda one: one[1].saved)}
    whole = None
    for path, manifest in sorted(found, key=lambda one: (last[one[1].run], one[1].step), reverse=True):
        try:
            check_files(path, manifest)
        except (CheckpointError, OSError) as error:
            damaged.append(error.message if isinstance(error, CheckpointError) else str(error))
            continue
        whole = path
        break
    if damaged and whole is None:
        raise CheckpointError(f"None of the checkpoints in {parent} is whole. {' '.join(damaged)}")
    for message in damaged:
        warnings.warn(f"{message} It is skipped; the run goes on from {whole}.", NestorWarning, stacklevel=2)
    return whole


def prune(parent: Path, run: str, keep: int) -> None:
    """Delete the checkpoints of a run but the newest ``keep``; those of other runs, and damaged ones, stay."""
    own = []
    for path in complete(parent):
        try:
            manifest = read_manifest(path)
        except (CheckpointError, OSError):
            continue
        if manifest.run == run:
            own.append(path)
    for path in own[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _text(state: Json) -> str:
    return json.dumps(state, allow_nan=False, separators=(",", ":"))
