"""Ranges for torch.profiler, named after level and phase."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C._autograd import _profiler_enabled

_NOTHING = nullcontext()


def phase(level: str, name: str) -> AbstractContextManager[object]:
    """Mark what runs inside as ``level/name`` for a profiler; free of cost where none is listening."""
    if not _profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(f"{level}/{name}")
