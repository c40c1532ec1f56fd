"""Arguments of a graph that were packed once: before each run, they are compared with what is there now."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from nestor.compilation.arguments import Arguments, Unpack, flat_batch
from nestor.data.draws import Draw
from nestor.solvers import SolveState
from nestor.training.level_state import LevelState
from nestor.vectors import Params


class HeldVariables:
    """The variables of all levels, which stay the same objects; a callback may give them other memory.

    Args:
        values: The variables.
    """

    def __init__(self, values: Params) -> None:
        self._values = list(values)
        self._known: tuple[list[int], list[Any]] = ([], [])

    def pack(self, arguments: Arguments) -> Unpack[list[Tensor]]:
        """Pack the variables, without their graph."""
        self._known = self._places()
        return arguments.add_variables([value.detach() for value in self._values])

    def is_same(self) -> bool:
        """Return whether the variables have the memory and the strides that they had."""
        return self._places() == self._known

    def _places(self) -> tuple[list[int], list[Any]]:
        return list(map(Tensor.data_ptr, self._values)), list(map(Tensor.stride, self._values))


class HeldDraws:
    """The batches of some steps of a level.

    Args:
        name: The name of the level.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # For each batch: the object if it cannot change, its key, and the slice of its tensors among the arguments.
        self._batches: list[Any] = []
        self._kinds: list[Any] = []
        self._slices: list[slice] = []

    def pack(self, arguments: Arguments, steps: Sequence[Sequence[Draw]]) -> Unpack[list[tuple[Draw, ...]]]:
        """Pack the batches."""
        self._batches, self._kinds, self._slices = [], [], []
        first = len(arguments.tensors)
        for draws in steps:
            for draw in draws:
                tensors, kind, is_fixed = flat_batch(draw.batch)
                self._batches.append(draw.batch if is_fixed else _CHANGES)
                self._kinds.append(kind)
                self._slices.append(slice(first, first := first + len(tensors)))
        return arguments.add_draws(self._name, steps)

    def is_same(self, arguments: list[Tensor], steps: Sequence[Sequence[Draw]]) -> bool:
        """Update the arguments; return False if another graph is needed."""
        index = 0
        for draws in steps:
            for draw in draws:
                batch = draw.batch
                if batch is not self._batches[index]:
                    tensors, kind, is_fixed = flat_batch(batch)
                    if kind != self._kinds[index]:
                        return False
                    arguments[self._slices[index]] = tensors
                    self._batches[index] = batch if is_fixed else _CHANGES
                index += 1
        return True


_CHANGES = object()


class HeldNotes:
    """The noted variables of levels above a level that is evaluated and does not step.

    Args:
        state: The state of the level.
    """

    def __init__(self, state: LevelState) -> None:
        self._state = state
        self._names: list[str] = []
        self._slice = slice(0, 0)

    def pack(self, arguments: Arguments) -> Unpack[dict[str, list[Tensor]]]:
        """Pack the variables."""
        noted = self._state.uppers_then
        self._names = list(noted)
        first = len(arguments.tensors)
        self._slice = slice(first, first + sum(map(len, noted.values())))
        return arguments.add_noted(noted)

    def is_same(self, arguments: list[Tensor]) -> bool:
        """Update the arguments; return False if another graph is needed."""
        noted = self._state.uppers_then
        if not noted and not self._names:
            return True
        arguments[self._slice] = [tensor for values in noted.values() for tensor in values]
        return list(noted) == self._names


class HeldSolves:
    """What a level keeps of its last solves, for the next ones: the start of a warm start, and the solver's memory.

    Args:
        state: The state of the level.
    """

    def __init__(self, state: LevelState) -> None:
        self._state = state
        self._kinds: list[Any] = []
        self._slice = slice(0, 0)
        self._results: list[tuple[str, slice, slice]] = []

    def pack(self, arguments: Arguments) -> Unpack[dict[str, SolveState]]:
        """Pack the vectors."""
        solves = self._state.solves
        sizes = {lower: (len(solve.value), len(solve.memory)) for lower, solve in solves.items()}
        self._kinds, tensors = self._present()
        self._slice = slice(first := len(arguments.tensors), first + len(tensors))
        arguments.key.append(tuple(sizes.items()))
        unpack = arguments.add_variables(tensors)

        def placed(flat: Iterator[Tensor]) -> dict[str, SolveState]:
            vectors = iter(unpack(flat))
            return {
                lower: SolveState([next(vectors) for _ in range(values)], [next(vectors) for _ in range(memory)])
                for lower, (values, memory) in sizes.items()
            }

        return placed

    def place(self, sizes: Mapping[str, tuple[int, int]], first: int) -> int:
        """Note where the graph returns the vectors; return the index that follows.

        Args:
            sizes: The number of vectors for each level below: of the start, and of the solver's memory.
            first: The index of the first vector among the results.
        """
        self._results = []
        for lower, (values, memory) in sizes.items():
            middle = first + values
            self._results.append((lower, slice(first, middle), slice(middle, first := middle + memory)))
        return first

    def is_same(self, arguments: list[Tensor]) -> bool:
        """Update the arguments; return False if another graph is needed."""
        if not self._kinds and not self._state.solves:
            return True
        kinds, tensors = self._present()
        arguments[self._slice] = tensors
        return kinds == self._kinds

    def write(self, found: Sequence[Tensor]) -> None:
        """Store the vectors for the next solves."""
        for lower, value, memory in self._results:
            if value.start < memory.stop:
                solve = self._state.solves.setdefault(lower, SolveState())
                solve.value, solve.memory = list(found[value]), list(found[memory])

    def _present(self) -> tuple[list[Any], list[Tensor]]:
        kinds: list[Any] = []
        tensors: list[Tensor] = []
        for lower, solve in self._state.solves.items():
            if solve.value or solve.memory:
                kinds.append((lower, len(solve.value), [(t.shape, t.stride()) for t in (*solve.value, *solve.memory)]))
                tensors += [*solve.value, *solve.memory]
        return kinds, tensors
