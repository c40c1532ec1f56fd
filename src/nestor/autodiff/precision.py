"""Mixed precision: which operations of a loss run in half precision, and the scale that keeps their gradients alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class LossScale:
    """The factor by which fp16 gradients are scaled up on their way; it adapts to what overflows.

    Halved when a step overflows, doubled after so many steps that did not (Micikevicius et al., Mixed precision
    training, ICLR 2018). Everything stays on the device: no value is read.

    Args:
        device: Of the level.
        start: First scale.
        growth_interval: Steps without an overflow before it is doubled.

    Attributes:
        scale: The present factor.
        good: Steps since the last overflow or growth.
        skipped: Steps that overflowed, and were skipped.
    """

    device: torch.device
    start: float = 2.0**16
    growth_interval: int = 2_000
    scale: Tensor = field(init=False)
    good: Tensor = field(init=False)
    skipped: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scale = torch.tensor(self.start, device=self.device)
        self.good = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), device=self.device)

    def update(self, finite: Tensor) -> None:
        """Adapt to a step that was finite, or was not."""
        self.good = torch.where(finite, self.good + 1, 0.0)
        grown = self.good >= self.growth_interval
        factor = torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
        self.scale = torch.clamp(self.scale * factor, min=1.0, max=2.0**24)
        self.good = torch.where(grown, 0.0, self.good)
        self.skipped = self.skipped + torch.where(finite, 0.0, 1.0)

    def back_off(self, finite: Tensor) -> None:
        """Halve the scale if the step of a level above, whose response runs through this one, was not finite."""
        self.good = torch.where(finite, self.good, 0.0)
        self.scale = torch.clamp(self.scale * torch.where(finite, 1.0, 0.5), min=1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it over."""
        self.scale, self.good, self.skipped = (state[key].to(self.device) for key in ("scale", "good", "skipped"))


@dataclass(frozen=True, eq=False)
class Precision:
    """The precision of a level's losses: parameters, gradients, solvers and differences stay in single precision.

    Attributes:
        dtype: Of the operations that autocast chooses; None chooses none.
        scaling: The loss scale of fp16; None for the others.
    """

    dtype: torch.dtype | None
    scaling: LossScale | None = None

    @classmethod
    def of(cls, name: str, device: torch.device) -> Precision | None:
        """Make the precision of a name; None for ``"fp32"``.

        Raises:
            ValueError: If the name is unknown.
        """
        check_precision(name)
        if name == "fp32":
            return None
        return cls(DTYPES[name], LossScale(device) if name == "fp16" else None)

    @classmethod
    def above_scaled(cls, device: torch.device) -> Precision:
        """Make that of a single-precision level whose hypergradient runs through fp16 losses, and may overflow."""
        return cls(None, LossScale(device, start=1.0))

    @contextmanager
    def evaluate(self, device: torch.device) -> Iterator[None]:
        """Run operations in half precision where that is safe."""
        if self.dtype is None:
            yield
            return
        # Weights that were cast once must not be taken again: they may stand for other tensors by then.
        with torch.autocast(device.type, dtype=self.dtype, cache_enabled=False):
            yield


def check_precision(name: str | None) -> None:
    """Reject an unknown name.

    Raises:
        ValueError: If it is none of ``"bf16"``, ``"fp16"``, ``"fp32"``.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"precision={name!r} must be one of {', '.join(map(repr, DTYPES))}.")
