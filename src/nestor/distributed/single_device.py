"""One process on one device."""

from __future__ import annotations

import torch

from nestor.distributed.runtime import Runtime
from nestor.levels.evaluator import Evaluator


class SingleDevice(Runtime):
    """Move the program's modules to one device; batches follow their levels.

    Args:
        device: The device; None takes the accelerator if there is one and all modules are still on the CPU, and leaves
            them where they are otherwise.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = None if device is None else torch.device(device)

    def place(self, evaluator: Evaluator) -> Evaluator:
        """Move the modules in place: parameters stay the objects that the optimizers hold."""
        device = self.device
        tensors = [p for level in evaluator.levels.values() for p in level.problem.module.parameters()]
        if device is None and all(p.device.type == "cpu" for p in tensors):
            device = torch.accelerator.current_accelerator(check_available=True)
        if device is not None:
            for level in evaluator.levels.values():
                level.problem.module.to(device)
        return evaluator
