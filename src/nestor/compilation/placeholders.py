"""Optimizer steps on placeholders, which the compiler traces."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.autodiff.instruments import require_true
from nestor.compilation.arguments import without_tensors
from nestor.compilation.buffers import PlacedBuffers, Values
from nestor.data.draws import Draw
from nestor.distributed import SingleDevice
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Gradient, Level, is_finite
from nestor.optim.state import State
from nestor.optim.stepper import is_of_torch
from nestor.optim.update import Update
from nestor.solvers import SolveState
from nestor.training.level_state import LevelState, OptimizerMemory
from nestor.training.stepper import Stepper
from nestor.vectors import Params, algebra


class LevelLayout(NamedTuple):
    """Describes the results of a graph for one level.

    Attributes:
        slots: The layout of the memory of its rule.
        solves: For each level below, the number of vectors that its solve keeps: of the start, and of the memory.
        metrics: The names of the metrics.
        stats: For each level below, the names of the statistics of its solve, and the notice of a truncated solve.
        places: Where the numbers are: those of the loss, the norm, the metrics and the statistics, in this order. Each
            is the index of a vector among the results that follow the buffers, and an index into that vector.
    """

    slots: list[dict[str, Any]]
    solves: dict[str, tuple[int, int]]
    metrics: list[str]
    stats: dict[str, tuple[list[str], str]]
    places: list[tuple[int, int]]


class StepsLayout(NamedTuple):
    """Describes the results of a graph of steps.

    Attributes:
        levels: The results for each level that steps.
        buffers: The indices of the buffers that the steps change.
    """

    levels: dict[str, LevelLayout]
    buffers: list[int]


class PlaceholderRun:
    """The states of a run, with placeholders for all tensors that steps change.

    Args:
        evaluator: The evaluator of the run.
        variables: Placeholders for the variables of all levels, by level name.
        memories: For each level that steps, placeholders for the memory of its rule.
        rules: For each level that steps, its rule, with placeholders for the learning rates.
        draws: For each level that is evaluated, the batches of its steps, or those of its last step.
        noted: For levels that are evaluated and do not step, the noted variables of levels above that have stepped.
        solves: For each level that steps, placeholders for what its solves keep.
        buffers: Placeholders for the buffers of the modules.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        variables: Mapping[str, Params],
        memories: Mapping[str, list[dict[str, Any]]],
        rules: Mapping[str, Update],
        draws: Mapping[str, Sequence[tuple[Draw, ...]]],
        noted: Mapping[str, Mapping[str, Params]],
        solves: Mapping[str, dict[str, SolveState]],
        buffers: Values,
    ) -> None:
        placed = {name: algebra.leaves(values) for name, values in variables.items()}
        evaluator = evaluator.with_variables(placed)
        levels = {name: _with_rule(level, rules.get(name)) for name, level in evaluator.levels.items()}
        self.evaluator = evaluator.with_levels(levels)
        self.states = {name: LevelState(level, 0, SingleDevice()) for name, level in levels.items()}
        self._variables = placed
        self._buffers = PlacedBuffers(buffers) if buffers else None
        for name, memory in memories.items():
            state = self.states[name]
            state.memory = OptimizerMemory(state.level, memory)
            state.solves = solves[name]
            if state.history is not None:
                # The compiler chooses which states are stored and which are recomputed.
                spec = state.history.spec
                state.history.spec = replace(spec, spacing=1, pieces=None, offload_to=None, graphs=False)
        for name, steps in draws.items():
            if name in memories:
                self.states[name].draws.prefetched = deque(steps)
            else:
                self.states[name].draws.latest = steps[0]
                self.states[name].uppers_then = dict(noted[name])

    def commit(self, state: LevelState, gradient: Gradient, step: int) -> bool:
        """Replace the placeholders of a level's variables and memory by the results of its step."""
        level = state.level
        before = State([t.detach() for t in level.parameters], state.memory.slots)
        finite = is_finite(gradient)
        inputs = {name: self.evaluator.levels[name].parameters for name in level.links.dependencies}
        with torch.no_grad():
            after = level.stepping.rule().differentiable_step(before, gradient.values, inputs)
        holds = finite & _is_whole(after, before, level)
        require_true(holds)
        if finite.device.type != "cpu" and len(after.tensors()) == len(before.tensors()):
            # On an accelerator the flag is not read: a mask selects the old values if the step is not finite. On the
            # CPU the caller reads the flag, and discards all results. The first step of a rule creates its memory, so
            # there are no old values to select.
            pairs = zip(after.tensors(), before.tensors(), strict=True)
            after = after.replace([torch.where(holds, new, old) for new, old in pairs])
        # The lists of placeholders are those of the levels: all levels read the new ones.
        self._variables[level.name][:] = algebra.leaves(after.params)
        state.memory.slots = list(map(dict, after.slots))
        return True

    def take(self, names: Sequence[str]) -> None:
        """Take steps in order; a level may step several times."""
        stepper = Stepper(self.evaluator, self.states, self.commit)
        stepper.keeps_histories = True  # responses must not change tensors in place
        with nullcontext() if self._buffers is None else self._buffers.active():
            for name in names:
                state = self.states[name]
                state.draws.advance()
                stepper.announce(state)
                with torch.enable_grad():
                    stepper.take(state, 0)

    def results(self, names: Sequence[str]) -> tuple[list[Tensor], StepsLayout]:
        """Return the results of the steps of some levels, and a layout that describes them.

        First come the variables of all levels, then the tensors of their memory, what their solves keep, and buffers.
        The last results are vectors, one for each dtype, of all numbers: losses, norms of gradients, metrics, and the
        statistics of solves.
        """
        layout: dict[str, LevelLayout] = {}
        variables: list[Tensor] = []
        memory: list[Tensor] = []
        kept: list[Tensor] = []
        numbers = _Numbers()
        for name in names:
            state = self.states[name]
            gradient = state.metrics.gradient
            assert gradient is not None
            tensors, slots = without_tensors(state.memory.slots)
            solves = {lower: (len(solve.value), len(solve.memory)) for lower, solve in state.solves.items()}
            stats = {lower: (list(solve.stats), solve.notice) for lower, solve in state.solves.items()}
            values = [gradient.loss, gradient.norm, *gradient.metrics.values()]
            values += [value for solve in state.solves.values() for value in solve.stats.values()]
            layout[name] = LevelLayout(slots, solves, list(gradient.metrics), stats, numbers.add(values))
            variables += state.level.parameters
            memory += tensors
            for solve in state.solves.values():
                kept += [*solve.value, *solve.memory]
        changed, buffers = ([], []) if self._buffers is None else self._buffers.changed()
        return [*variables, *memory, *kept, *buffers, *numbers.vectors()], StepsLayout(layout, changed)


class _Numbers:
    """Collects numbers in vectors, one for each dtype: a result costs more time than its number."""

    def __init__(self) -> None:
        self._vectors: dict[Any, list[Tensor]] = {}

    def add(self, values: Iterable[Any]) -> list[tuple[int, int]]:
        """Add numbers; return the index of the vector of each, and its index in that vector."""
        places: list[tuple[int, int]] = []
        for value in map(torch.as_tensor, values):
            vector = self._vectors.setdefault((value.dtype, value.device), [])
            places.append((list(self._vectors).index((value.dtype, value.device)), len(vector)))
            vector.append(value.detach().reshape(()))
        return places

    def vectors(self) -> list[Tensor]:
        return [torch.stack(values) for values in self._vectors.values()]


def _is_whole(after: State, before: State, level: Level) -> Tensor:
    """Return whether variables and memory of torch's optimizers are finite after a step where they were before."""
    optimizer = level.stepping.optimizer
    new, old = list(after.params), list(before.params)
    if optimizer is not None and is_of_torch(optimizer) and len(after.tensors()) == len(before.tensors()):
        new, old = after.tensors(), before.tensors()
    # x - x is zero if x is finite, and not a number otherwise. Sums of these run faster than truth values of entries.
    broken = [torch.where(o - o == 0, n - n, 0.0).sum() for n, o in zip(new, old, strict=True)]
    return reduce(torch.add, broken) == 0


def _with_rule(level: Level, rule: Update | None) -> Level:
    # The rule of a level with tasks steps all tasks already.
    return level if rule is None else replace(level, stepping=replace(level.stepping, update=rule, tasks=False))
