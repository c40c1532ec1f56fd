"""The steps of some levels by one graph: where its arguments come from, and where its results go."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from nestor.compilation.arguments import ArgumentCache, Arguments
from nestor.compilation.buffers import HeldModules
from nestor.compilation.constancy import check_constant
from nestor.compilation.graph import CompiledGraph
from nestor.compilation.held import HeldDraws, HeldNotes, HeldSolves, HeldUpdate, HeldVariables
from nestor.compilation.placeholders import PlaceholderRun, StepsLayout
from nestor.data.draws import Draw
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Gradient
from nestor.optim.rules import rule_of
from nestor.solvers import SolveState
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState
from nestor.vectors import algebra

Steps: TypeAlias = Mapping[str, Sequence[tuple[Draw, ...]]]
"""For each level, the batches of its steps."""


class Plan:
    """Packs the arguments of a graph of steps once; then runs the graph as long as nothing asks for another one.

    Args:
        names: The levels in the order in which they step; one may step several times.
        evaluator: The evaluator of the run.
        states: The state of each level, by name.
        cache: The cache of arguments.

    Attributes:
        arguments: The arguments of the next run, and their key; see :meth:`pack`.
        graph: The graph; None before :meth:`use`.
        is_cpu: Whether the levels are on the CPU, where the last result is read at once.
    """

    def __init__(
        self, names: Sequence[str], evaluator: Evaluator, states: Mapping[str, LevelState], cache: ArgumentCache
    ) -> None:
        self.graph: CompiledGraph | None = None
        self.arguments = Arguments(cache)
        self.names = tuple(names)
        self._evaluator, self._states, self._cache = evaluator, states, cache
        self._stepping = [states[name] for name in dict.fromkeys(names)]
        reads = list(dict.fromkeys(read for name in names for read in evaluator.below(name)))
        self._read = [evaluator.levels[name] for name in reads]
        self._variables = HeldVariables([p for level in evaluator.levels.values() for p in level.parameters])
        self._updates = {state.level.name: HeldUpdate(state, cache, rated=_is_rated(state)) for state in self._stepping}
        self._solves = {state.level.name: HeldSolves(state) for state in self._stepping if state.level.lowers}
        self._modules = HeldModules(self._read)
        self._draws = [(HeldDraws(name), states[name], name) for name in reads]
        self._notes = {name: HeldNotes(states[name]) for name in reads if name not in self._updates}
        self._constants = [c for level in self._read if (c := level.loss.reader.constants) is not None]
        self._watches = [level.loss.reader.watch for level in self._read]
        self._targets: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._new_buffers = slice(0, 0)
        self._results: list[_Results] = []
        problems = [state.level.problem for state in self._stepping]
        self._schedulers = [problem.scheduler for problem in problems if problem.scheduler is not None]
        self.is_cpu = self._read[0].parameters[0].is_cpu

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
        self.arguments = arguments = Arguments(self._cache, *key, self.names)
        evaluator = self._evaluator
        variables = self._variables.pack(arguments)
        updates = {name: update.pack(arguments) for name, update in self._updates.items()}
        draws = {n: held.pack(arguments, own.get(n) or [state.draws.latest]) for held, state, n in self._draws}
        noted = {name: notes.pack(arguments) for name, notes in self._notes.items()}
        solves = {name: held.pack(arguments) for name, held in self._solves.items()}
        modules = self._modules.pack(arguments)

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

    def use(self, graph: CompiledGraph) -> None:
        """Use a graph for the arguments that were packed last."""
        self.graph = graph
        placed = by_level(self._evaluator, self.arguments.tensors)
        self._targets = [p for state in self._stepping for p in placed[state.level.name]]
        layout: StepsLayout = graph.layout
        index = len(self._targets)
        for name, update in self._updates.items():
            index = update.place(layout.levels[name].slots, index)
        for name, solves in self._solves.items():
            index = solves.place(layout.levels[name].solves, index)
        self._buffers = self._modules.targets(self.arguments.tensors, layout.buffers)
        self._new_buffers = slice(index, index := index + len(self._buffers))
        self._results = []
        for state in self._stepping:
            level = layout.levels[state.level.name]
            self._results.append(results := _Results(state, index, level.metrics, level.stats))
            index = results.stop

    def is_same(self, own: Steps) -> bool:
        """Update the arguments for other batches and the present values; return False if another graph may be needed.

        Everything is compared by identity: a step changes little that it has not written itself.
        """
        arguments = self.arguments.tensors
        for constants in self._constants:
            constants.look()
            if constants.moving:
                return False
        for watch in self._watches:
            if watch.used:
                return False
        if not (self._variables.is_same() and self._modules.is_same()):
            return False
        for update in self._updates.values():
            if not update.is_same(arguments):
                return False
        for draws, state, name in self._draws:
            if not draws.is_same(arguments, own.get(name) or [state.draws.latest]):
                return False
        for solves in self._solves.values():
            if not solves.is_same(arguments):
                return False
        return all(notes.is_same(arguments) for notes in self._notes.values())

    def accept(self, found: Sequence[Tensor], guard: FiniteGuard, step: int) -> None:
        """Write the results of the graph into the states of the levels.

        Args:
            found: The results.
            guard: Receives the flags of steps on an accelerator, which are checked later.
            step: The number of the last engine step, for errors.
        """
        algebra.copy_(self._targets, found[: len(self._targets)])
        for update in self._updates.values():
            update.write(found, self.arguments.tensors)
        for solves in self._solves.values():
            solves.write(found)
        if self._buffers:
            algebra.copy_(self._buffers, found[self._new_buffers])
        for results in self._results:
            results.note(found)
            if not self.is_cpu:
                guard.defer(found[-1], results.state.level, results.gradient(), step)
        for scheduler in self._schedulers:
            scheduler.step()


class _Results:
    """The scalars that a graph returns for one level.

    Args:
        state: The state of the level.
        first: The index of the first result.
        metrics: The names of the metrics.
        solves: For each level below, the names of the statistics of its solve, and the notice of a truncated solve.
    """

    def __init__(
        self, state: LevelState, first: int, metrics: Sequence[str], solves: Mapping[str, tuple[list[str], str]]
    ) -> None:
        self.state = state
        self._slice = slice(first, first + 2 + len(metrics))
        self._metrics = metrics
        self._solves: list[tuple[str, list[str], str, slice]] = []
        index = self._slice.stop
        for lower, (keys, notice) in solves.items():
            self._solves.append((lower, keys, notice, slice(index, index := index + len(keys))))
        self.stop = index
        self._found: Sequence[Tensor] = ()

    def note(self, found: Sequence[Tensor]) -> None:
        """Store the scalars in the level's state; those of its gradient when they are read."""
        state, metrics = self.state, self.state.metrics
        self._found = found[self._slice]
        for lower, keys, notice, place in self._solves:
            solve = state.solves.get(lower) or state.solves.setdefault(lower, SolveState())
            solve.notice = notice
            solve.note(dict(zip(keys, found[place], strict=True)))
        if metrics.first_norm is None:
            metrics.record(self.gradient())
        else:
            metrics.record_later(self.gradient)

    def gradient(self) -> Gradient:
        """Return the scalars of the gradient."""
        loss, norm, *metrics = self._found
        return Gradient(loss, dict(zip(self._metrics, metrics, strict=True)), [], norm, {})


def by_level(evaluator: Evaluator, variables: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Split tensors in the order of all levels' variables."""
    flat = iter(variables)
    return {name: [next(flat) for _ in level.parameters] for name, level in evaluator.levels.items()}


def _is_rated(state: LevelState) -> bool:
    optimizer = state.level.problem.optimizer
    return optimizer is not None and rule_of(optimizer) is not None
