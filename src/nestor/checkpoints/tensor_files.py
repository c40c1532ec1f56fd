"""Tensors in safetensors files, laid out as the shards that ``torch.distributed.checkpoint`` reads."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nestor.errors import CheckpointError

_PATTERN = "tensors-*.safetensors"
# The key under which HuggingFaceStorageReader of torch.distributed.checkpoint looks for the offsets of each shard.
_SHARDING = "DCP_SHARDING_INFO"


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, shard: int = 1, shards: int = 1) -> None:
    """Write the tensors of one process to ``tensors-<shard>-of-<shards>.safetensors``; no file for no tensor.

    The header names the offset of each tensor in the whole one, so that
    ``torch.distributed.checkpoint.HuggingFaceStorageReader`` reads the folder too.

    Args:
        folder: The folder.
        tensors: Contiguous tensors on the CPU that share no memory.
        shard: The number of this file, from 1.
        shards: The number of files.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if tensors:
        offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
        path = folder / f"tensors-{shard:05d}-of-{shards:05d}.safetensors"
        try:
            save_file(dict(tensors), path, metadata={"format": "pt", _SHARDING: json.dumps(offsets)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder to the CPU; they are no views of the files.

    Raises:
        CheckpointError: If a file is no safetensors file, or a name occurs twice.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 -- the file is no mapping
                    if name in tensors:
                        raise CheckpointError(f"{path} contains the tensor {name!r}, which another file has too.")
                    tensors[name] = file.get_tensor(name).clone()
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    return tensors


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a folder, read from the headers alone."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, int] = {}
    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = found.get(name, 0) + _count(part.get_shape()) * BYTES[part.get_dtype()]
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    return found


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
