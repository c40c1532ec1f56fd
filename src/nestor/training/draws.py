"""What a level draws during a run: batches, and the random numbers of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nestor.autodiff.randomness import Seeded, Seeds
from nestor.data.draw import Draw
from nestor.data.stream import Stream, move
from nestor.distributed import Runtime
from nestor.levels.level import Level

# The streams of random numbers of a level.
DATA, LOSS, VALIDATION = range(3)


class Draws:
    """Draws the batches of one level, each with random numbers of its own.

    Args:
        level: The level.
        seed: The seed of the run.
        runtime: Shares batches among processes.

    Attributes:
        latest: The batches of the last optimizer step.
        count: Batches drawn.
        prefetched: Batches drawn for steps that were not taken yet, one entry a step.
    """

    def __init__(self, level: Level, seed: int, runtime: Runtime) -> None:
        self.latest: tuple[Draw, ...] = ()
        self.count = 0
        self.prefetched: deque[tuple[Draw, ...]] = deque()
        self._level = level
        self._runtime = runtime
        data = runtime.data(level.problem.data)
        # A loader that loads this process's rows only; a batch of any other data is cut.
        self._loads_share = data is not level.problem.data
        self._stream = Stream(data, level.name) if data is not None and level.loss.takes_batch else None
        self.reseed(seed)

    @property
    def epoch(self) -> int:
        """How often the data was started again."""
        return max(self._stream.epoch, 0) if self._stream else 0

    def reseed(self, seed: int) -> None:
        """Draw the random numbers that follow another seed."""
        self._data_seeds = Seeds(seed, self._level.index, DATA)
        # Each process has dropout masks of its own; the first one has those of a single process.
        rank = (self._runtime.rank,) if self._runtime.rank else ()
        self._loss_seeds = Seeds(seed, self._level.index, LOSS, *rank)

    def advance(self) -> None:
        """Draw the batches of the next optimizer step."""
        if self.prefetched:
            self.latest = self.prefetched.popleft()
            return
        count = self._level.problem.accumulate
        self.latest = (self._draw(),) if count == 1 else tuple(self._draw() for _ in range(count))

    def _draw(self) -> Draw:
        batch = None
        if self._stream is not None:
            if not self._stream.constant:
                self._seed_data(self.count)
            batch = self._stream.draw()
            if not self._loads_share:
                batch = self._runtime.share(batch)
            device = self._level.parameters[0].device
            if device.type != "cpu":
                batch = move(batch, device)
        randomness = Seeded(self._loss_seeds(self.count))
        self.count += 1
        return Draw(batch, randomness)

    def _seed_data(self, index: int) -> None:
        # Loaders shuffle and datasets augment with the global generators. Each level seeds them for its own draws, so
        # the order of its data does not depend on what other levels draw.
        Seeded(self._data_seeds(index)).begin()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, except the latest draws, which the level's history holds."""
        return {
            "count": self.count,
            "prefetched": [pack_draws(draws) for draws in self.prefetched],
            "stream": self._stream.state_dict() if self._stream is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], latest: tuple[Draw, ...]) -> None:
        """Continue where another run stood; ``latest`` are the draws of its last step."""
        self.latest, self.count = latest, state["count"]
        self.prefetched = deque(unpack_draws(draws) for draws in state["prefetched"])
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"], self._seed_data)


def pack_draws(draws: Sequence[Draw]) -> list[tuple[Any, int]]:
    """Write the batches of a run as plain data."""
    # All draws of a run have seeds.
    return [(draw.batch, draw.randomness.seed) for draw in draws if isinstance(draw.randomness, Seeded)]


def unpack_draws(draws: Sequence[tuple[Any, int]]) -> tuple[Draw, ...]:
    """Read the batches of a run."""
    return tuple(Draw(batch, Seeded(seed)) for batch, seed in draws)
