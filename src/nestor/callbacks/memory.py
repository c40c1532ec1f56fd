"""How much memory a run takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from nestor.callbacks.measuring import Measuring

_STATM = Path("/proc/self/statm")


class Memory(Measuring):
    """Measure memory, in units of 10^6 bytes.

    ``memory/resident_mb`` is the process's resident set; where the system has no ``/proc`` (macOS), its peak. With an
    accelerator also what tensors hold there, ``memory/accelerator_mb``, and the most they held since the process
    began, ``memory/accelerator_peak_mb`` (not on MPS, which does not count it).
    """

    def metrics(self) -> dict[str, float]:
        """Return the present numbers; see :class:`Measuring`."""
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
    """Bytes of the process in memory: now, or at most so far if the system does not say; 0 if it says neither."""
    if _STATM.exists():
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kibibytes elsewhere
