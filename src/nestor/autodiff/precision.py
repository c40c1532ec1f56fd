"""Mixed precision: autocast for the losses of a level, and the loss scale of fp16."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SMALLEST = 1.0
"""The smallest loss scale."""

LARGEST_EXPONENT = 24
"""The binary logarithm of the largest loss scale."""

MOST_SKIPPED = 50
"""The number of steps that may overflow in a row at the smallest loss scale."""


@dataclass(eq=False)
class LossScale:
    """The factor that multiplies an fp16 loss before its reverse pass, so that small gradients do not become zero.

    It is halved when a step overflows, and doubled after ``growth_interval`` steps without an overflow (Micikevicius et
    al., Mixed precision training, ICLR 2018). All of its numbers stay tensors on the device: no value is read.

    Args:
        device: The device of the level.
        start: The first scale.
        growth_interval: Number of steps without an overflow after which the scale is doubled.
        patience: Number of steps in a row that may overflow at the smallest scale.

    Attributes:
        scale: The current factor.
        good: Number of steps since the last overflow or growth.
        skipped: Number of steps that overflowed; they were skipped.
        stuck: Number of the last steps that overflowed in a row at the smallest scale.
    """

    device: torch.device
    start: float = 2.0**16
    growth_interval: int = 2_000
    patience: int = MOST_SKIPPED
    scale: Tensor = field(init=False)
    good: Tensor = field(init=False)
    skipped: Tensor = field(init=False)
    stuck: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scale = torch.tensor(self.start, device=self.device)
        self.good = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        self.stuck = torch.zeros((), device=self.device)

    def update(self, finite: Tensor) -> None:
        """Adapt the scale after a step; ``finite`` is true if the gradient of the step was finite."""
        self.stuck = torch.where(finite | (self.scale > SMALLEST), 0.0, self.stuck + 1)
        self.good = torch.where(finite, self.good + 1, 0.0)
        grown = self.good >= self.growth_interval
        factor = torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
        self.scale = torch.clamp(self.scale * factor, min=SMALLEST, max=2.0**LARGEST_EXPONENT)
        self.good = torch.where(grown, 0.0, self.good)
        self.skipped = self.skipped + torch.where(finite, 0.0, 1.0)

    def back_off(self, finite: Tensor) -> None:
        """Halve the scale if the step of a level above, whose hypergradient uses the scale, was not finite."""
        self.good = torch.where(finite, self.good, 0.0)
        self.scale = torch.clamp(self.scale * torch.where(finite, 1.0, 0.5), min=SMALLEST)

    def goes_on(self) -> Tensor:
        """Return, as a tensor, whether fewer than ``patience`` steps in a row overflowed at the smallest scale."""
        return self.stuck < self.patience

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint saves."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped, "stuck": self.stuck}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the tensors of a checkpoint."""
        self.scale, self.good = state["scale"].to(self.device), state["good"].to(self.device)
        self.skipped, self.stuck = state["skipped"].to(self.device), state["stuck"].to(self.device)


@dataclass(frozen=True, eq=False)
class Precision:
    """The precision of a level's losses. Parameters, gradients, solvers and differences stay in single precision.

    Attributes:
        dtype: The half-precision type of autocast; None is for no autocast.
        scaling: The loss scale of fp16; None for other precisions.
    """

    dtype: torch.dtype | None
    scaling: LossScale | None = None

    @classmethod
    def of(cls, name: str, device: torch.device) -> Self | None:
        """Return the precision with this name; None for ``"fp32"``.

        Raises:
            ValueError: If the name is unknown.
        """
        check_precision(name)
        if name == "fp32":
            return None
        return cls(DTYPES[name], LossScale(device) if name == "fp16" else None)

    @classmethod
    def above_scaled(cls, device: torch.device) -> Self:
        """Return the precision of a single-precision level above fp16 levels, whose hypergradient may overflow."""
        # Its own scale is the smallest from the start; those below need at most that many steps to become the smallest.
        return cls(None, LossScale(device, start=SMALLEST, patience=MOST_SKIPPED + LARGEST_EXPONENT))

    @contextmanager
    def evaluate(self, device: torch.device) -> Iterator[None]:
        """Run the operations inside under autocast."""
        if self.dtype is None:
            yield
            return
        # No cache of cast weights: the next evaluation may use other tensors for the same parameters.
        with torch.autocast(device.type, dtype=self.dtype, cache_enabled=False):
            yield


def check_precision(name: str | None) -> None:
    """Check the name of a precision.

    Raises:
        ValueError: If the name is none of ``"bf16"``, ``"fp16"``, ``"fp32"``.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"precision={name!r} must be one of {', '.join(map(repr, DTYPES))}.")
