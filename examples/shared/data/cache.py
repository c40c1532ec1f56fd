"""Tensors that are computed once and kept in the data folder."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def load_cached(file: Path) -> dict[str, Tensor] | None:
    return load_file(file) if file.exists() else None


def save_cached(file: Path, **tensors: Tensor) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
