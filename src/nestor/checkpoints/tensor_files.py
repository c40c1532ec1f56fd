"""Tensors in safetensors files, laid out as the shards that ``torch.distributed.checkpoint`` reads."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.errors import CheckpointError

_PATTERN = "tensors-*.safetensors"
# The key under which HuggingFaceStorageReader of torch.distributed.checkpoint looks for the offsets of each shard.
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


Offsets: TypeAlias = Mapping[str, Sequence[int]]
"""Where a piece of a tensor begins in the whole one, by name; a tensor that is not named is whole."""


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    offsets: Offsets = MappingProxyType({}),
    shard: int = 1,
    shards: int = 1,
) -> None:
    """Write the tensors of one process to ``tensors-<shard>-of-<shards>.safetensors``; no file for no tensor.

    The header names the offset of each piece in the whole tensor, so that
    ``torch.distributed.checkpoint.HuggingFaceStorageReader`` reads the folder too.

    Args:
        folder: The folder.
        tensors: Contiguous tensors, or pieces of them, on the CPU, that share no memory.
        offsets: The offsets of pieces.
        shard: The number of this file, from 1.
        shards: The number of files.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if tensors:
        places = {name: {_OFFSETS: list(offsets.get(name, [0] * t.dim()))} for name, t in tensors.items()}
        path = folder / f"tensors-{shard:05d}-of-{shards:05d}.safetensors"
        try:
            save_file(dict(tensors), path, metadata={"format": "pt", _SHARDING: json.dumps(places)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder to the CPU, whole, from any number of files; they are no views of the files.

    Raises:
        CheckpointError: If a file is no safetensors file, or the pieces of a tensor do not make a whole one.
    """
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for name, offset, piece in _pieces(folder):
        pieces.setdefault(name, []).append((offset, piece.clone()))
    return {name: _joined(name, parts) for name, parts in pieces.items()}


def _pieces(folder: Path) -> Iterator[tuple[str, list[int], Tensor]]:
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                places = json.loads((file.metadata() or {}).get(_SHARDING, "{}"))
                for name in file.keys():  # noqa: SIM118 -- the file is no mapping
                    yield name, places[name][_OFFSETS], file.get_tensor(name)
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path} is no tensor file of a checkpoint: {error}") from error


def _joined(name: str, pieces: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Join the pieces of a tensor, which do not overlap."""
    offset, first = pieces[0]
    if len(pieces) == 1 and not any(offset):
        return first
    try:
        ends = [[start + size for start, size in zip(at, piece.shape, strict=True)] for at, piece in pieces]
        whole = torch.empty([max(sizes) for sizes in zip(*ends, strict=True)], dtype=first.dtype)
        for (at, piece), end in zip(pieces, ends, strict=True):
            whole[tuple(map(slice, at, end))] = piece
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"The pieces of the tensor {name!r} do not fit together: {error}") from error
    if sum(piece.numel() for _, piece in pieces) != whole.numel():
        raise CheckpointError(f"The tensor {name!r} is not whole: pieces are missing, or overlap.")
    return whole


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a folder, read from the headers alone."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, int] = {}
    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = found.get(name, 0) + math.prod(part.get_shape()) * BYTES[part.get_dtype()]
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    return found


BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
