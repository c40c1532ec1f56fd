"""The memory of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from nestor.training.callback import Callback

_STATM = Path("/proc/self/statm")


class Memory(Callback):
    """Measure memory, in units of 10^6 bytes.

    ``memory/resident_mb`` is the resident set of the process, or its peak on a system without ``/proc`` (macOS). With
    an accelerator, ``memory/accelerator_mb`` is the memory of all tensors on it, and ``memory/accelerator_peak_mb`` the
    maximum since the process began (not on MPS, which has no such counter).
    """

    def metrics(self) -> dict[str, float]:
        """Measure the present memory."""
        found = {"memory/resident_mb": resident() / 1e6} if resident() else {}
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return found
        if accelerator.type == "mps":
            return found | {"memory/accelerator_mb": torch.mps.current_allocated_memory() / 1e6}
        return found | {
            "memory/accelerator_mb": torch.accelerator.memory_allocated() / 1e6,
            "memory/accelerator_peak_mb": torch.accelerator.max_memory_allocated() / 1e6,
        }


def resident() -> int:
    """Return the resident set of the process in bytes: the present one, else the peak, else 0 if neither is known."""
    if _STATM.exists():
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, other systems kibibytes
