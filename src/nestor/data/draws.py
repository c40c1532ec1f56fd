"""Draws of a level: batches from any iterable, each with its own random numbers."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from nestor.data.source import Source
from nestor.errors import NestorError, NestorWarning

# Asking torch for the accelerator takes as long as a small operation, and every evaluation seeds the generators.
_accelerator = cache(partial(torch.accelerator.current_accelerator, check_available=True))


@contextmanager
def untouched() -> Iterator[None]:
    """Restore the states of the default generators on exit."""
    states = Captured.now()
    try:
        yield
    finally:
        states.restore()


@dataclass(frozen=True)
class Captured:
    """The states of torch's default generators: of the CPU, and of each accelerator if there are any."""

    cpu: Tensor
    accelerators: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> Self:
        """Read the current states."""
        states: list[Tensor] = []
        if (accelerator := _accelerator()) is not None:
            module = torch.get_device_module(accelerator)
            states = [module.get_rng_state(index) for index in range(torch.accelerator.device_count())]
        return cls(torch.default_generator.get_state(), tuple(states))

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.default_generator.set_state(self.cpu)
        for index, state in enumerate(self.accelerators):
            torch.get_device_module().set_rng_state(state, index)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Set the generators to these states, and restore the current ones on exit."""
        with untouched():
            self.restore()
            yield


_NOTHING = nullcontext()


class Seeded(NamedTuple):
    """The states of the generators after a seed is set.

    ``replay`` restores nothing on exit. Its callers seed every draw and run inside :func:`untouched`.
    """

    seed: int

    def replay(self) -> AbstractContextManager[None]:
        """Seed the default generators; nothing is restored on exit."""
        # torch.manual_seed also seeds back ends that this build does not have, which takes 100 times as long.
        torch.default_generator.manual_seed(self.seed)
        if (accelerator := _accelerator()) is not None:
            torch.get_device_module(accelerator).manual_seed_all(self.seed)
        return _NOTHING


def seeds(*numbers: int) -> Callable[[int], int]:
    """Return the function from the index of a draw to its seed: ``seeds(*numbers)(index) == mix(*numbers, index)``."""
    start = _absorb(0, numbers)
    return lambda index: _absorb(start, (index,)) >> 1


def mix(*numbers: int) -> int:
    """Hash integers to a seed by splitmix64: similar numbers give unrelated seeds."""
    return _absorb(0, numbers) >> 1  # 63 bits: torch.manual_seed expects a signed integer


_MASK = (1 << 64) - 1


def _absorb(state: int, numbers: Iterable[int]) -> int:
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Draw(NamedTuple):
    """One batch, and the random numbers that every evaluation on it uses."""

    batch: Any
    randomness: Captured | Seeded


class Stream:
    """An endless stream of batches: the iterable is restarted when it ends.

    Args:
        data: Iterable of batches.
        level: Name of the level that draws from the stream, for errors.

    Attributes:
        epoch: Number of restarts of the iterable; -1 before the first batch.
        drawn: Number of batches drawn so far; ``begun`` is its value at the last restart.
        constant: True if drawing uses no random numbers: the data are a list or a tuple.
    """

    def __init__(self, data: Iterable[Any], level: str) -> None:
        self.data = data
        self.level = level
        self.epoch = -1
        self.drawn = 0
        self.begun = 0
        self.constant = type(data) in (list, tuple)
        self._iterator: Iterator[Any] | None = None

    def draw(self) -> Any:
        """Return the next batch.

        Raises:
            NestorError: If the iterable is empty, or is an iterator that has ended.
        """
        if self._iterator is not None:
            for batch in self._iterator:
                self.drawn += 1
                return batch
        self.begun = self.drawn
        self._iterator = iter(self.data)
        self.epoch += 1
        for batch in self._iterator:
            self.drawn += 1
            return batch
        if self.epoch and self._iterator is self.data:
            raise NestorError(
                "The data has ended and cannot be restarted: it is an iterator, such as a generator. Pass an iterable "
                "such as a DataLoader or a list.",
                level=self.level,
            )
        raise NestorError(
            "The data is empty: it yields no batch. Is the dataset empty, or the batch size larger than the dataset "
            "with drop_last=True?",
            level=self.level,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, and the state of data that have a ``state_dict``."""
        own = self.data.state_dict() if isinstance(self.data, Stateful) and self._iterator is not None else None
        return {"epoch": self.epoch, "drawn": self.drawn, "begun": self.begun, "data": own}

    def load_state_dict(self, state: Mapping[str, Any], prepare: Callable[[int], None]) -> None:
        """Restore the position of a stream.

        Data with ``state_dict`` and ``load_state_dict`` (torchdata's ``StatefulDataLoader``) restore their own state.
        Any other data are restarted, and the batches of the epoch are drawn again with the same random numbers.
        ``prepare`` is called with the number of a batch before the batch is drawn; it seeds the generators.
        """
        self.epoch, self.drawn, self.begun = state["epoch"], state["drawn"], state["begun"]
        self._iterator = None
        if self.epoch < 0:
            return
        if state["data"] is not None and isinstance(self.data, Stateful):
            self.data.load_state_dict(state["data"])
            prepare(self.drawn)
            self._iterator = iter(self.data)
            return
        skipped = self.drawn - self.begun
        if skipped and not isinstance(self.data, Sequence):
            warnings.warn(
                f"Level {self.level!r}: its data has no state_dict, so {skipped} batches are drawn again to restore "
                "the position of the run. Use torchdata's StatefulDataLoader to restore it without drawing.",
                NestorWarning,
                stacklevel=2,
            )
        prepare(self.begun)
        self._iterator = iter(self.data)
        for index in range(self.begun, self.drawn):
            if index > self.begun:
                prepare(index)
            next(self._iterator, None)


@runtime_checkable
class Stateful(Protocol):
    """Data that can save and restore their position."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position."""


# The streams of random numbers of a level.
DATA, LOSS, VALIDATION = range(3)


class Draws:
    """Draws the batches of one level, each with its own random numbers.

    Args:
        stream: The level's data; None if its loss has no batch argument.
        index: The index of the level. Each level has its own random numbers.
        seed: The seed of the run.
        rank: The number of this process. Each process has its own dropout masks.
        accumulate: Number of batches per optimizer step.
        prepare: Returns this process's share of a batch, on the level's device; None leaves batches unchanged.

    Attributes:
        latest: The batches of the last optimizer step.
        count: Number of batches drawn.
        prefetched: Batches drawn for steps that have not been taken yet, one entry for each step.
    """

    def __init__(
        self,
        stream: Source | None,
        index: int,
        seed: int,
        *,
        rank: int = 0,
        accumulate: int = 1,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        self.latest: tuple[Draw, ...] = ()
        self.count = 0
        self.prefetched: deque[tuple[Draw, ...]] = deque()
        self._stream = stream
        self._accumulate = accumulate
        self._prepare = prepare
        # Rank 0 uses the same random numbers as a run in a single process.
        self._source = (index, (rank,) if rank else ())
        self.reseed(seed)

    @property
    def epoch(self) -> int:
        """Number of restarts of the data."""
        return max(self._stream.epoch, 0) if self._stream else 0

    def reseed(self, seed: int) -> None:
        """Derive all random numbers from another seed."""
        index, rank = self._source
        self._data_seed = seeds(seed, index, DATA)
        self._loss_seed = seeds(seed, index, LOSS, *rank)

    def advance(self) -> None:
        """Draw the batches of the next optimizer step."""
        if self.prefetched:
            self.latest = self.prefetched.popleft()
        elif self._accumulate == 1:
            self.latest = (self._draw(),)
        else:
            self.latest = tuple(self._draw() for _ in range(self._accumulate))

    def _draw(self) -> Draw:
        batch = None
        if self._stream is not None:
            if not self._stream.constant:
                self._seed_data(self.count)
            batch = self._stream.draw()
            if self._prepare is not None:
                batch = self._prepare(batch)
        randomness = Seeded(self._loss_seed(self.count))
        self.count += 1
        return Draw(batch, randomness)

    def _seed_data(self, index: int) -> None:
        # Loaders shuffle and datasets augment with the global generators. Each level seeds them for its own draws, so
        # the order of its data does not depend on what other levels draw.
        Seeded(self._data_seed(index)).replay()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, except the latest draws, which the level's history holds."""
        return {
            "count": self.count,
            "prefetched": list(self.prefetched),
            "stream": self._stream.state_dict() if self._stream is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], latest: tuple[Draw, ...]) -> None:
        """Restore the position of another run; ``latest`` are the draws of its last step."""
        self.latest, self.count = latest, state["count"]
        self.prefetched = deque(state["prefetched"])
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"], self._seed_data)
