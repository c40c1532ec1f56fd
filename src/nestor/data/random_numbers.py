"""Random numbers of an evaluation: the global generators of torch, Python and numpy, set before and restored after."""

import ctypes
import importlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Asking torch for the accelerator takes as long as a small operation, and every evaluation seeds the generators.
_accelerator = cache(partial(torch.accelerator.current_accelerator, check_available=True))


@cache
def _torch_seeders() -> list[Callable[[int], object]]:
    """Return what seeds torch's default generators: of the CPU, and of the accelerator if there is one."""
    # torch.manual_seed also seeds back ends that this build does not have, which takes 100 times as long.
    seeders: list[Callable[[int], object]] = [torch.default_generator.manual_seed]
    if (accelerator := _accelerator()) is not None:
        seeders.append(torch.get_device_module(accelerator).manual_seed_all)
    return seeders


GeneratorState: TypeAlias = tuple[Any, ...]
"""The state of a generator outside of torch, as numbers."""


class GlobalGenerator(NamedTuple):
    """A global generator outside of torch."""

    name: str
    seed: Callable[[int], None]
    draw: Callable[[], float]
    state: Callable[[], GeneratorState]
    restore: Callable[[GeneratorState], None]
    mark: Callable[[], bytes | None] = lambda: None
    """Return what differs if the state differs, and takes no time to read; None if there is nothing such."""

    def has_normal(self, state: GeneratorState) -> bool:
        """Return whether a state contains a normal number that was drawn in advance, which a mark does not show."""
        return bool(state[-1] if self.name == _PYTHON.name else state[-2])


def _python_state() -> GeneratorState:
    _, words, normal = random.getstate()
    return (*words, normal)


_PYTHON = GlobalGenerator(
    "python",
    random.seed,
    random.random,
    _python_state,
    lambda state: random.setstate((random.Random.VERSION, tuple(state[:-1]), state[-1])),
)


@cache
def _numpy() -> tuple[GlobalGenerator, ...]:
    """Return numpy's global generator; none if its algorithm was replaced by one that cannot be seeded again."""
    numpy: Any = importlib.import_module("numpy.random")  # numpy loads it at its first use, which may be in a loss

    def state() -> GeneratorState:
        _, words, *rest = numpy.get_state()
        return (*words.tolist(), *rest)

    def restore(state: GeneratorState) -> None:
        numpy.set_state(("MT19937", state[:-3], *state[-3:]))

    if numpy.get_state(legacy=False)["bit_generator"] != "MT19937":
        return ()

    def seed(number: int) -> None:
        numpy.seed(number & 0xFFFFFFFF)  # numpy's seeds have 32 bits

    return (GlobalGenerator("numpy", seed, numpy.random_sample, state, restore, _mark_of(numpy)),)


def _mark_of(numpy: Any) -> Callable[[], bytes | None]:
    """Return a function that reads the memory of numpy's generator; to read its state takes a hundred times as long."""
    try:
        generator = numpy.get_bit_generator()
        memory = (ctypes.c_uint32 * 625).from_address(generator.ctypes.state_address)
    except AttributeError:  # an older numpy
        return lambda: None
    _, words, place, *_ = numpy.get_state()
    if list(memory) != [*words.tolist(), place]:  # the layout is not documented
        return lambda: None
    return lambda: bytes(memory) if numpy.get_bit_generator() is generator else None


def global_generators() -> tuple[GlobalGenerator, ...]:
    """Return the global generators outside of torch: Python's, and numpy's if numpy is loaded."""
    return (_PYTHON, *_numpy()) if "numpy" in sys.modules else (_PYTHON,)


def _states(generators: Iterable[GlobalGenerator]) -> list[GeneratorState]:
    return [generator.state() for generator in generators]


def _restore(generators: Iterable[GlobalGenerator], states: Iterable[GeneratorState]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.restore(state)


class Watch:
    """Notices whether a function draws numbers from the global generators of Python and numpy.

    To seed these takes five times as long as to seed torch's. They are seeded for the first evaluations of the function
    and for a few later ones; if the function moves one of them, they are seeded for every evaluation that follows.

    Attributes:
        used: Whether the function draws from them.
        evaluations: Number of evaluations until it was noticed.
    """

    def __init__(self, *, used: bool = False) -> None:
        self.used = used
        self.evaluations = 0

    def is_due(self) -> bool:
        """Count an evaluation; return whether the generators of Python and numpy are set for it."""
        if self.used:
            return True
        self.evaluations = count = self.evaluations + 1
        # 16 evaluations see a function that draws in one of two cases but for 1 in 65,000 times. One in 64 costs a
        # tenth of a microsecond per evaluation.
        return count <= 16 or not count & 63

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, for a resumed run."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.used, self.evaluations = state["used"], state["evaluations"]


@contextmanager
def untouched() -> Iterator[None]:
    """Restore the states of torch's default generators on exit."""
    states = Captured.now()
    try:
        yield
    finally:
        states.restore()


@contextmanager
def all_untouched() -> Iterator[None]:
    """Restore the states of the default generators of torch, Python and numpy on exit."""
    generators = global_generators()
    before = _states(generators)
    with untouched():
        try:
            yield
        finally:
            _restore(generators, before)


@dataclass(frozen=True)
class Captured:
    """The states of torch's default generators: of the CPU, and of each accelerator if there are any.

    Attributes:
        others: The states of the generators of Python and numpy at the first watched evaluation; empty before it.
    """

    cpu: Tensor
    accelerators: tuple[Tensor, ...]
    others: list[GeneratorState] = field(default_factory=list)

    @classmethod
    def now(cls) -> Self:
        """Read the current states."""
        states: list[Tensor] = []
        if (accelerator := _accelerator()) is not None:
            module = torch.get_device_module(accelerator)
            states = [module.get_rng_state(index) for index in range(torch.accelerator.device_count())]
        return cls(torch.default_generator.get_state(), tuple(states))

    def restore(self) -> None:
        """Set torch's generators to these states."""
        torch.default_generator.set_state(self.cpu)
        for index, state in enumerate(self.accelerators):
            torch.get_device_module().set_rng_state(state, index)

    @contextmanager
    def replay(self, watch: Watch | None = None) -> Iterator[None]:
        """Set the generators to these states, and restore the current ones on exit.

        Args:
            watch: Decides whether the generators of Python and numpy are set too; None leaves them alone.
        """
        with untouched():
            self.restore()
            if watch is None or not watch.is_due():
                yield
                return
            generators = global_generators()
            before = _states(generators)
            if not self.others:
                self.others.extend(before)
            elif self.others != before:
                _restore(generators, self.others)
            try:
                yield
            finally:
                watch.used = watch.used or _states(generators) != self.others
                if watch.used:
                    _restore(generators, before)

    def call(self, watch: Watch, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function with the generators set to these states; see :meth:`replay`."""
        with self.replay(watch):
            return function(*arguments)


_NOTHING = nullcontext()


class Seeded:
    """The states of the generators after a seed is set.

    ``replay`` restores nothing on exit. Its callers seed every draw and run inside :class:`RunGenerators`.

    Args:
        index: The seed; or, with ``seed_of``, the index of a draw.
        seed_of: Returns the seed for the index, when the seed is first used: a compiled step uses none.
    """

    __slots__ = ("_index", "_seed_of")

    def __init__(self, index: int, seed_of: Callable[[int], int] | None = None) -> None:
        self._index = index
        self._seed_of = seed_of

    @property
    def seed(self) -> int:
        """The seed."""
        if self._seed_of is not None:
            self._index, self._seed_of = self._seed_of(self._index), None
        return self._index

    def replay(self, watch: Watch) -> AbstractContextManager[None]:
        """Seed the default generators; nothing is restored on exit.

        Args:
            watch: Decides whether the generators of Python and numpy are seeded too.
        """
        for seed in _torch_seeders():
            seed(self.seed)
        return self._replay_others(watch) if watch.used or watch.is_due() else _NOTHING

    def call(self, watch: Watch, function: Callable[..., T], *arguments: Any) -> T:
        """Seed the default generators and call a function; see :meth:`replay`."""
        for seed in _torch_seeders():
            seed(self.seed)
        if not (watch.used or watch.is_due()):
            return function(*arguments)
        with self._replay_others(watch):
            return function(*arguments)

    def _replay_others(self, watch: Watch) -> AbstractContextManager[None]:
        generators = global_generators()
        for generator in generators:
            generator.seed(self.seed)
        if watch.used:
            return _NOTHING
        # The state of numpy's generator takes 30 microseconds to read. Its next number tells as much, and takes one.
        expected = [generator.draw() for generator in generators]
        for generator in generators:
            generator.seed(self.seed)
        return _noticing(watch, generators, expected)


@contextmanager
def _noticing(watch: Watch, generators: Iterable[GlobalGenerator], expected: list[float]) -> Iterator[None]:
    """Notice on exit whether a generator has moved: its next number is not the expected one."""
    try:
        yield
    finally:
        watch.used = watch.used or [generator.draw() for generator in generators] != expected
