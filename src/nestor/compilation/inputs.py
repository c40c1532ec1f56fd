"""Everything that the steps of some levels depend on, as arguments of a graph."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from nestor.compilation.arguments import ArgumentCache, Arguments
from nestor.compilation.buffers import HeldModules
from nestor.compilation.constancy import check_constant
from nestor.compilation.held import HeldDraws, HeldNotes, HeldSolves, HeldVariables
from nestor.compilation.held_update import HeldUpdate
from nestor.compilation.placeholders import PlaceholderRun
from nestor.data.draws import Draw
from nestor.levels.evaluator import Evaluator
from nestor.training.level_state import LevelState

Steps: TypeAlias = Mapping[str, Sequence[tuple[Draw, ...]]]
"""For each level, the batches of its steps."""


class StepInputs:
    """Packs the arguments of a graph of steps once; then looks whether they are still the same objects.

    Args:
        names: The levels in the order in which they step; one may step several times.
        evaluator: The evaluator of the run.
        states: The state of each level, by name.
        cache: The cache of arguments.

    Attributes:
        arguments: The arguments of the next run, and their key.
        updates: For each level that steps, its update rule.
        solves: For each level that steps and has lowers, what its solves keep.
        modules: The modules that are read.
    """

    def __init__(
        self, names: Sequence[str], evaluator: Evaluator, states: Mapping[str, LevelState], cache: ArgumentCache
    ) -> None:
        self.arguments = Arguments(cache)
        self._names, self._evaluator, self._cache = tuple(names), evaluator, cache
        stepping = list(dict.fromkeys(names))
        reads = list(dict.fromkeys(read for name in stepping for read in evaluator.below(name)))
        self._read = [evaluator.levels[name] for name in reads]
        self._variables = HeldVariables([p for level in evaluator.levels.values() for p in level.parameters])
        self.updates = {name: HeldUpdate(states[name], cache) for name in stepping}
        self.solves = {name: HeldSolves(states[name]) for name in stepping if states[name].level.lowers}
        self.modules = HeldModules(self._read)
        self._draws = [(HeldDraws(name), states[name], name) for name in reads]
        self._notes = {name: HeldNotes(states[name]) for name in reads if name not in self.updates}

    def pack(self, own: Steps, *key: Hashable) -> Callable[[Iterator[Tensor]], PlaceholderRun]:
        """Pack everything that the steps depend on.

        Args:
            own: The batches of the steps.
            key: The first entries of the key.

        Returns:
            A function that reads the placeholders of the arguments, to trace the steps.

        Raises:
            Unsuitable: If the steps cannot be one graph.
        """
        for level in self._read:
            check_constant(level)
        self.arguments = arguments = Arguments(self._cache, *key, self._names)
        evaluator = self._evaluator
        variables = self._variables.pack(arguments)
        updates = {name: update.pack(arguments) for name, update in self.updates.items()}
        draws = {n: held.pack(arguments, own.get(n) or [state.draws.latest]) for held, state, n in self._draws}
        noted = {name: notes.pack(arguments) for name, notes in self._notes.items()}
        solves = {name: held.pack(arguments) for name, held in self.solves.items()}
        modules = self.modules.pack(arguments)

        def placed(flat: Iterator[Tensor]) -> PlaceholderRun:
            tensors = by_level(evaluator, variables(flat))
            memories, rules = {}, {}
            for name, unpack in updates.items():
                memories[name], groups = unpack(flat)
                rule = evaluator.levels[name].stepping.rule()
                rules[name] = rule.with_groups(groups) if groups else rule
            batches = {name: unpack(flat) for name, unpack in draws.items()}
            values = {name: unpack(flat) for name, unpack in noted.items()}
            kept = {name: solves[name](flat) if name in solves else {} for name in updates}
            # Copies: operations that change buffers find the placeholders by their memory.
            buffers = [(slots, tensor.clone()) for slots, tensor in modules(flat)]
            return PlaceholderRun(evaluator, tensors, memories, rules, batches, values, kept, buffers)

        return placed

    def is_same(self, own: Steps) -> bool:
        """Update the arguments for other batches and the present values; return False if another graph may be needed.

        Everything is compared by identity: a step changes little that it has not written itself.
        """
        arguments = self.arguments.tensors
        for level in self._read:
            reader = level.loss.reader
            if (constants := reader.constants) is not None:
                constants.look()
                if constants.moving:
                    return False
            if reader.watch.used:
                return False
        if not (self._variables.is_same() and self.modules.is_same()):
            return False
        for update in self.updates.values():
            if not update.is_same(arguments):
                return False
        for draws, state, name in self._draws:
            if not draws.is_same(arguments, own.get(name) or [state.draws.latest]):
                return False
        for solves in self.solves.values():
            if not solves.is_same(arguments):
                return False
        return all(notes.is_same(arguments) for notes in self._notes.values())

    def repeats(self) -> bool:
        """Update the arguments for the latest batch of each level and the last solves; see :meth:`is_same`."""
        arguments = self.arguments.tensors
        for draws, state, _ in self._draws:
            if not draws.is_same(arguments, (state.draws.latest,)):
                return False
        return all(solves.is_same(arguments) for solves in self.solves.values())

    def variables(self) -> dict[str, list[Tensor]]:
        """Return the arguments that are the variables of each level."""
        return by_level(self._evaluator, self.arguments.tensors)


def by_level(evaluator: Evaluator, variables: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Split tensors in the order of all levels' variables."""
    flat = iter(variables)
    return {name: [next(flat) for _ in level.parameters] for name, level in evaluator.levels.items()}
