"""The random numbers of one evaluation, which can be drawn again.

All evaluations inside one response draw the same random numbers. With dropout, the difference of two evaluations with
different masks would measure the masks, not the derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GeneratorStates:
    """States of torch's default generators: of the CPU and, if there are accelerators, of each of them."""

    cpu: Tensor
    accelerators: tuple[Tensor, ...]

    @classmethod
    def capture(cls) -> GeneratorStates:
        """Read the current states."""
        return cls(torch.default_generator.get_state(), tuple(_accelerator_states()))

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.default_generator.set_state(self.cpu)
        if self.accelerators:
            module = torch.get_device_module()
            for index, state in enumerate(self.accelerators):
                module.set_rng_state(state, index)


def _accelerator_states() -> list[Tensor]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator)
    return [module.get_rng_state(index) for index in range(torch.accelerator.device_count())]


@contextmanager
def untouched() -> Iterator[None]:
    """Restore the states of the default generators on exit."""
    states = GeneratorStates.capture()
    try:
        yield
    finally:
        states.restore()


class Randomness(ABC):
    """A state of the default generators to which evaluations return."""

    @abstractmethod
    def replay(self) -> AbstractContextManager[None]:
        """Return a context inside which every use of this object draws the same random numbers."""


@dataclass(frozen=True)
class Captured(Randomness):
    """The states of the generators at one time."""

    states: GeneratorStates

    @classmethod
    def now(cls) -> Captured:
        """Capture the current states."""
        return cls(GeneratorStates.capture())

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Set the captured states inside, and restore the present ones on exit."""
        with untouched():
            self.states.restore()
            yield


_NOTHING = nullcontext()


@dataclass(frozen=True)
class Seeded(Randomness):
    """The states of the generators after a seed is set.

    ``replay`` restores nothing on exit. Code that uses it seeds every draw, and runs inside :func:`untouched`.
    """

    seed: int

    def replay(self) -> AbstractContextManager[None]:
        """Seed the default generators."""
        self.begin()
        return _NOTHING

    def begin(self) -> None:
        """Seed the default generators."""
        # torch.manual_seed also seeds back ends that this build does not have, which takes 100 times as long.
        torch.default_generator.manual_seed(self.seed)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            torch.get_device_module(accelerator).manual_seed_all(self.seed)


class Seeds:
    """The seeds of successive draws: ``seeds(index)`` is ``mix(*numbers, index)``."""

    def __init__(self, *numbers: int) -> None:
        self._start = _absorb(0, numbers)

    def __call__(self, index: int) -> int:
        """Return the seed of a draw."""
        return _absorb(self._start, (index,)) >> 1


def mix(*numbers: int) -> int:
    """Hash integers to a seed by splitmix64: numbers that are close give unrelated seeds."""
    return _absorb(0, numbers) >> 1  # 63 bits: torch.manual_seed takes a signed integer


_MASK = (1 << 64) - 1


def _absorb(state: int, numbers: Iterable[int]) -> int:
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
