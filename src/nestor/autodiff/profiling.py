"""Ranges for ``torch.profiler``, named after level and phase."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from nestor.autodiff.torch_private import is_profiler_enabled

_NOTHING = nullcontext()


def phase(level: str, name: str) -> AbstractContextManager[object]:
    """Record the code inside as the range ``level/name``, if a profiler runs."""
    if not is_profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(f"{level}/{name}")
