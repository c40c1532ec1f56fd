"""The memory and the hyperparameters of an update rule, which were packed once and are compared before each run."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nestor.compilation.arguments import (
    ArgumentCache,
    Arguments,
    Unpack,
    Updated,
    count_tensors,
    kinds_of,
    with_tensors,
)
from nestor.optim.rules import rule_of
from nestor.training.level_state import LevelState


class HeldUpdate:
    """The memory of a level's update rule and the hyperparameters of its optimizer.

    Args:
        state: The state of the level.
        cache: Makes tensors of learning rates.
    """

    def __init__(self, state: LevelState, cache: ArgumentCache) -> None:
        self._name = state.level.name
        self._memory = _HeldMemory(state)
        self._options: _HeldOptions | None = None
        optimizer = state.level.problem.optimizer
        self.is_rated = optimizer is not None and rule_of(optimizer) is not None
        if optimizer is not None:
            self._options = _HeldOptions(self._name, optimizer, cache, rated=self.is_rated)

    def pack(self, arguments: Arguments) -> Unpack[Updated]:
        """Pack the memory, and the learning rates of a rule that is written out; other numbers are constants."""
        first = len(arguments.tensors)
        slots, count = self._memory.hold(first)
        groups = () if self._options is None else self._options.hold(first + count)
        return arguments.add_update(self._name, slots, groups, rated=self.is_rated)

    def place(self, layout: list[dict[str, Any]], first: int) -> int:
        """Note where the graph returns the memory after the steps; return the index that follows.

        Args:
            layout: The layout of the memory, without its tensors.
            first: The index of the first tensor among the results.
        """
        return self._memory.place(layout, first)

    def is_same(self, arguments: list[Tensor]) -> bool:
        """Update the arguments; return False if another graph may be needed."""
        return self._memory.is_same(arguments) and (self._options is None or self._options.is_same(arguments))

    def move(self, found: Sequence[Tensor], arguments: list[Tensor]) -> None:
        """Make the memory after the steps that of the next run."""
        self._memory.move(found, arguments)

    def write(self, found: Sequence[Tensor]) -> None:
        """Store the memory after the steps in the level; the next run begins with it, or with another memory."""
        self._memory.write(found)


class _HeldMemory:
    """The memory of a rule: mappings in the state of its optimizer, or of the level."""

    def __init__(self, state: LevelState) -> None:
        self._memory = state.memory
        self._in_optimizer = state.level.stepping.optimizer if state.level.stepping.optimizer_has_memory else None
        self._kinds: list[Any] = []
        self._slice = slice(0, 0)  # among the arguments
        self._results = slice(0, 0)  # among the results of the graph
        # False for the first step of a memory, which is cleared before the next cycle (``Problem(init=...)``).
        self._lasts = self._moves = True
        self._layout: list[dict[str, Any]] = []
        # The mappings that hold the memory, and the values in them.
        self._slots: Sequence[Mapping[str, Any]] | None = None
        self._values: list[list[Any]] = []

    def hold(self, first: int) -> tuple[Sequence[Mapping[str, Any]], int]:
        """Note the present memory, whose first argument has a given index; return it, and the number of its tensors."""
        slots = self._memory.read()
        self._kinds, tensors = kinds_of(slots)
        self._slice = slice(first, first + len(tensors))
        self._hold()
        return slots, len(tensors)

    def place(self, layout: list[dict[str, Any]], first: int) -> int:
        self._layout = layout
        count = count_tensors(layout)
        self._results = slice(first, first + count)
        self._lasts = count == self._slice.stop - self._slice.start
        self._moves = self._lasts and count > 0
        return self._results.stop

    def is_same(self, arguments: list[Tensor]) -> bool:
        if not self._holds():
            kinds, tensors = kinds_of(self._memory.read())
            if kinds != self._kinds:
                return False
            arguments[self._slice] = tensors
            self._hold()
        return True

    def move(self, found: Sequence[Tensor], arguments: list[Tensor]) -> None:
        if self._moves:
            arguments[self._slice] = found[self._results]

    def write(self, found: Sequence[Tensor]) -> None:
        tensors = found[self._results]
        if self._in_optimizer is None or tensors:
            self._memory.write(with_tensors(self._layout, iter(tensors)))
            if self._lasts:
                self._hold()
            else:
                self._slots = None

    def _holds(self) -> bool:
        """Return whether the memory consists of the same objects as before."""
        if self._in_optimizer is None:
            return self._memory.slots is self._slots
        slots = self._in_optimizer.state
        if self._slots is None or len(slots) != len(self._slots) or not all(map(is_, slots.values(), self._slots)):
            return False
        for slot, values in zip(self._slots, self._values, strict=True):
            if len(slot) != len(values) or not all(map(is_, slot.values(), values)):
                return False
        return True

    def _hold(self) -> None:
        if self._in_optimizer is None:
            self._slots = self._memory.slots
        else:
            self._slots = list(self._in_optimizer.state.values())
            self._values = [list(slot.values()) for slot in self._slots]


class _HeldOptions:
    """The hyperparameters of an optimizer."""

    def __init__(self, name: str, optimizer: Optimizer, cache: ArgumentCache, *, rated: bool) -> None:
        self._name, self._optimizer, self._cache, self._rated = name, optimizer, cache, rated
        self._first = 0
        # The parameter groups, and the values in them.
        self._groups: list[dict[str, Any]] = []
        self._values: list[list[Any]] = []

    def hold(self, first: int) -> list[dict[str, Any]]:
        """Note the present hyperparameters; return the parameter groups."""
        self._first = first
        self._groups = list(self._optimizer.param_groups)
        self._values = [list(group.values()) for group in self._groups]
        return self._groups

    def is_same(self, arguments: list[Tensor]) -> bool:
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        for index, group in enumerate(groups):
            values = self._values[index]
            if group is not self._groups[index] or len(group) != len(values):
                return False
            if not all(map(is_, group.values(), values)) and not self._is_equal(index, arguments):
                return False
        return True

    def _is_equal(self, index: int, arguments: list[Tensor]) -> bool:
        """Compare the hyperparameters of a group one by one: those of a schedule are other objects at every step."""
        values = self._values[index]
        for place, (key, value) in enumerate(self._groups[index].items()):
            if value is values[place]:
                continue
            if key == "lr" and self._rated:
                arguments[self._first + index] = self._cache.rate((self._name, index), value)
                values[place] = value
            elif key == "params" or isinstance(value, Tensor) or value != values[place]:
                return False
        return True
