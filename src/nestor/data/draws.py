"""Draws of a level: batches from any iterable, each with its own random numbers."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from nestor.data.loader_generators import LoaderGenerators
from nestor.data.random_numbers import Captured, Seeded, Watch, untouched
from nestor.data.reachable import reachable
from nestor.data.seeds import seeds
from nestor.data.source import Source
from nestor.data.workers import keeps_workers, starting
from nestor.errors import CheckpointError, NestorError, NestorWarning


class Draw(NamedTuple):
    """One batch, and what else every evaluation on it uses.

    Attributes:
        batch: The batch.
        randomness: The random numbers.
        step: Number of optimizer steps that the level took before the one with this batch.
    """

    batch: Any
    randomness: Captured | Seeded
    step: int = 0


class Stream:
    """An endless stream of batches: the iterable is restarted when it ends.

    Args:
        data: Iterable of batches.
        level: Name of the level that draws from the stream, for errors.

    Attributes:
        epoch: Number of restarts of the iterable; -1 before the first batch. Parts of the data with a method
            ``set_epoch`` are told the number before each pass.
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
        self._generators = LoaderGenerators(data)
        self._at_restart: list[Any] = []  # the states of the data's own generators
        self._starts_workers = keeps_workers(data) and not isinstance(data, Stateful)

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
        if not self.constant:
            self._at_restart = self._generators.states()
        self.epoch += 1
        self._iterator = self._begin()
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

    def iterables(self) -> list[Any]:
        """List the data."""
        return [self.data]

    def _begin(self) -> Iterator[Any]:
        if self.constant:
            return iter(self.data)
        for part in reachable(self.data, closed=(Iterator,)):
            if isinstance(part, Epochs):
                part.set_epoch(self.epoch)
        with starting(self.data):
            if self._starts_workers:
                # The first iteration of such a loader draws a seed for its workers, and later ones do not: a resumed
                # run, whose first iteration stands for a later one, would shuffle otherwise.
                states = self._generators.states()
                with untouched():
                    iter(self.data)
                self._generators.restore(states)
                self._starts_workers = False
            return iter(self.data)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, and the state of data that have a ``state_dict``."""
        own = self.data.state_dict() if isinstance(self.data, Stateful) and self._iterator is not None else None
        generators = {"at_restart": self._at_restart, "now": [] if self.constant else self._generators.states()}
        return {"epoch": self.epoch, "drawn": self.drawn, "begun": self.begun, "data": own, "generators": generators}

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that the data can go to the position of a saved stream.

        Raises:
            CheckpointError: If the data is an iterator that has been read further.
        """
        is_stateful = isinstance(self.data, Stateful) and state["data"] is not None
        if self.drawn and isinstance(self.data, Iterator) and not is_stateful:
            raise CheckpointError(
                f"The data is an iterator, of which {self.drawn} batches were read: it cannot go to batch "
                f"{state['drawn']}. Pass an iterable such as a DataLoader or a list, or build a new engine.",
                level=self.level,
            )

    def load_state_dict(self, state: Mapping[str, Any], prepare: Callable[[int], object]) -> None:
        """Restore the position of a stream.

        Data with ``state_dict`` and ``load_state_dict`` (torchdata's ``StatefulDataLoader``) restore their own state.
        Any other data are restarted, and the batches of the epoch are drawn again with the same random numbers.
        ``prepare`` is called with the number of a batch before the batch is drawn; it seeds the generators.
        """
        self.epoch, self.drawn, self.begun = state["epoch"], state["drawn"], state["begun"]
        self._iterator = None
        self._at_restart = state["generators"]["at_restart"]
        if self.epoch >= 0:
            self._go_to(state, prepare)
        self._generators.restore(state["generators"]["now"])

    def _go_to(self, state: Mapping[str, Any], prepare: Callable[[int], object]) -> None:
        if state["data"] is not None and isinstance(self.data, Stateful):
            self._generators.restore(self._at_restart)
            self.data.load_state_dict(state["data"])
            prepare(self.drawn)
            self._iterator = self._begin()
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
        self._generators.restore(self._at_restart)
        self._iterator = self._begin()
        for index in range(self.begun, self.drawn):
            if index > self.begun:
                prepare(index)
            next(self._iterator, None)


@runtime_checkable
class Epochs(Protocol):
    """A part of data that shuffles by the number of the epoch: a Hugging Face stream, a sampler.

    A stream that was restored skips what its epoch has read before, as long as it believes to be in that epoch.
    """

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that begins."""


@runtime_checkable
class Stateful(Protocol):
    """Data that can save and restore their position."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position."""


# The streams of random numbers of a level.
DATA, LOSS, VALIDATION, RUN = range(4)


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
        self._watch = Watch()
        # Rank 0 uses the same random numbers as a run in a single process.
        self._source = (index, (rank,) if rank else ())
        self.reseed(seed)

    @property
    def epoch(self) -> int:
        """Number of restarts of the data."""
        return max(self._stream.epoch, 0) if self._stream else 0

    @property
    def is_constant(self) -> bool:
        """Whether no code of the user's runs when a batch is drawn: there are no data, or a list or a tuple of them."""
        return self._prepare is None and (self._stream is None or self._stream.constant)

    def iterables(self) -> list[Any]:
        """List what the batches are drawn from."""
        return [] if self._stream is None else self._stream.iterables()

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
            if self._stream.constant:
                batch = self._stream.draw()
            else:
                with self._seed_data(self.count):
                    batch = self._stream.draw()
            if self._prepare is not None:
                batch = self._prepare(batch)
        draw = Draw(batch, Seeded(self.count, self._loss_seed), self.count // self._accumulate)
        self.count += 1
        return draw

    def _seed_data(self, index: int) -> AbstractContextManager[None]:
        # Loaders shuffle and datasets augment with the global generators. Each level seeds them for its own draws, so
        # the order of its data does not depend on what other levels draw.
        return Seeded(self._data_seed(index)).replay(self._watch)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, except the latest draws, which the level's history holds."""
        return {
            "count": self.count,
            "prefetched": list(self.prefetched),
            "stream": self._stream.state_dict() if self._stream is not None else None,
            "watch": self._watch.state_dict(),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that the data can go to the position of another run; see :meth:`Stream.check`."""
        if self._stream is not None:
            self._stream.check(state["stream"])

    def load_state_dict(self, state: Mapping[str, Any], latest: tuple[Draw, ...]) -> None:
        """Restore the position of another run; ``latest`` are the draws of its last step."""
        self.latest, self.count = latest, state["count"]
        self.prefetched = deque(state["prefetched"])
        if self._stream is not None:
            self._watch = Watch(used=True)  # numbers that are not drawn need no seed, but it does no harm
            self._stream.load_state_dict(state["stream"], self._seed_data)
        self._watch.load_state_dict(state["watch"])
