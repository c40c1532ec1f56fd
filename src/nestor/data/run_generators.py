"""The global random generators during a run."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nestor.data.random_numbers import GeneratorState, GlobalGenerator, global_generators, untouched


class StateReader:
    """Reads the states of generators; a state that has not changed since it was last read is not read again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, GeneratorState]] = {}

    def read(self, generator: GlobalGenerator) -> GeneratorState:
        """Return the state of a generator."""
        mark, known = generator.mark(), self._known.get(generator.name)
        if mark is not None and known is not None and known[0] == mark:
            return known[1]
        state = generator.state()
        self._known.pop(generator.name, None)
        if mark is not None and not generator.has_normal(state):
            self._known[generator.name] = (mark, state)
        return state


class RunGenerators:
    """The global generators during a run: they start from the run's seed, and the caller's states return at its end.

    Args:
        seed: The seed with which the generators of Python and numpy start. Torch's are seeded by every draw.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: dict[str, GeneratorState] = {}
        self._is_active = False
        self._outside, self._inside = StateReader(), StateReader()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Continue where the last part of the run ended; restore the states of all generators on exit."""
        generators = global_generators()
        before = [self._outside.read(generator) for generator in generators]
        with untouched():
            self._set()
            self._is_active = True
            try:
                yield
            finally:
                self._states, self._is_active = self._now(), False
                for generator, state in zip(generators, before, strict=True):
                    generator.restore(state)

    def _set(self) -> None:
        for generator in global_generators():
            if generator.name in self._states:
                generator.restore(self._states[generator.name])
            else:
                generator.seed(self._seed)

    def _now(self) -> dict[str, GeneratorState]:
        return (
            {generator.name: self._inside.read(generator) for generator in global_generators()}
            if self._is_active
            else self._states
        )

    def state_dict(self) -> dict[str, list[Any]]:
        """Return the states of the generators of Python and numpy in the run."""
        return {name: list(state) for name, state in self._now().items()}

    def load_state_dict(self, state: Mapping[str, Iterable[Any]]) -> None:
        """Load what :meth:`state_dict` returned; a run continues from there."""
        self._states = {name: tuple(values) for name, values in state.items()}
        if self._is_active:
            self._set()
