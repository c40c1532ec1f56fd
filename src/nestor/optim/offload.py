"""Stores states in temporary files instead of memory."""

import os
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


def offloaded(data: Any, folder: Path, device: torch.device) -> Callable[[], Any]:
    """Write data to a file; return a function that reads it, with its tensors on ``device``.

    The file is deleted when the function is garbage-collected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".pt", prefix="state-", dir=folder)
    os.close(handle)
    torch.save(data, name)
    read = partial(torch.load, name, map_location=device)
    weakref.finalize(read, partial(Path(name).unlink, missing_ok=True))
    return read
