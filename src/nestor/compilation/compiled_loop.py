"""The loop of a compiled run: whole cycles, or the steps of several levels, as one graph each."""

from collections.abc import Callable, Hashable, Mapping, Sequence

from nestor.compilation.arguments import Unsuitable
from nestor.compilation.compiled_steps import CompiledSteps
from nestor.compilation.step_compiler import CompiledReplay
from nestor.data.draws import Draw
from nestor.training.guard import MOST_PENDING
from nestor.training.level_state import LevelState
from nestor.training.loop import Loop
from nestor.training.run import Run

# Largest number of engine steps in one graph: the time of compilation grows with it.
LONGEST_CYCLE = 10
# Largest number of cycles between two looks at what is due.
MOST_REPEATED = 100


class CompiledLoop:
    """Takes engine steps by compiled graphs if possible, otherwise eagerly.

    A cycle consists of all steps up to the next step of a level with lowers. The cycle is one graph if no callback and
    no validation is due before its end.

    Args:
        loop: Takes the steps that are not compiled.
        is_observed: Whether a callback must be called after the step of each level in an engine step. Graphs then
            contain one level each.
    """

    def __init__(self, loop: Loop, is_observed: Callable[[int], bool] = lambda step: False) -> None:
        self._is_observed = is_observed
        self.schedule, self.stepper, self.guard = loop.schedule, loop.stepper, loop.guard
        self._steps = CompiledSteps(loop.stepper, loop.guard)
        self._groups: dict[tuple[str, ...], list[list[str]]] = {}
        self._cycles: dict[Hashable, _Cycle] = {}
        self._waits = False

    @property
    def eager_reasons(self) -> dict[str, str]:
        """The levels that were not compiled, with the reason."""
        return dict(self._steps.reasons)

    def advance(self, run: Run, next_due: Callable[[int], int], stepped: Callable[[str], None]) -> int:
        """Take some cycles by one graph, otherwise one engine step; see :meth:`Loop.advance`."""
        if len(self.guard.pending) > MOST_PENDING:
            self.guard.check()
        return self._cycle(run, next_due, stepped) or self._engine_step(run.step + 1, stepped)

    def _engine_step(self, step: int, stepped: Callable[[str], None]) -> int:
        due = self.schedule.due()
        for names in [[name] for name in due] if self._is_observed(step) else self._grouped(due):
            for name in names:
                self.stepper.prepare(self.stepper.states[name])
            refused = len(self._steps.reasons)
            if self._waits or not self._steps.take(names, step):
                for name in names:
                    self.stepper.take(self.stepper.states[name], step)
            if len(self._steps.reasons) != refused:
                self._groups.clear()
                self._cycles.clear()
            for name in names:
                self.schedule.stepped(name)
                stepped(name)
        return step

    def _grouped(self, due: Sequence[str]) -> list[list[str]]:
        """Split the levels that are about to step into groups; each group is one graph or one level."""
        known = self._groups.get(tuple(due))
        if known is not None:
            return known
        states = self.stepper.states
        groups: list[list[str]] = []
        is_open = False
        for name in due:
            together = states[name].history is None and self._steps.is_graph(name)
            if is_open and together:
                groups[-1].append(name)
            else:
                groups.append([name])
            is_open = together
        if all(states[name].steps > 0 for name in due):
            self._groups[tuple(due)] = groups
        return groups

    def _cycle(self, run: Run, next_due: Callable[[int], int], stepped: Callable[[str], None]) -> int:
        """Take whole cycles by one graph; return the number of the last engine step, or 0 if none was taken."""
        cycle = self._coming()
        last = run.step + cycle.length
        # No cycle fits in this run, or something is due within the cycle: compile single engine steps instead.
        if (
            not cycle.is_possible
            or cycle.length > run.last_step - run.first_step
            or self._is_observed(last)
            or self.stepper.keeps_histories
            or next_due(last) < last
        ):
            self._wait(False)
            return 0
        # Step eagerly until the next complete cycle. The first steps of a run create the optimizers' states, and the
        # last ones are fewer than a cycle: neither is worth a compilation. Prefetched batches belong to a cycle that
        # failed: its eager steps raise the error.
        waits = last > run.last_step or any(s.draws.prefetched or s.steps == 0 for s in cycle.states)
        self._wait(waits)
        # The graph records histories from their first step, so every level with a history must be about to restart.
        if waits or not all(state.restarts or state.history is None for state in cycle.states):
            return 0
        if not self._take_cycle(cycle, last):
            return 0
        for name in cycle.names:
            self.schedule.stepped(name)
        last += self._repeat(cycle, run, next_due, last)
        for name in cycle.ending:
            stepped(name)
        return last

    def _repeat(self, cycle: "_Cycle", run: Run, next_due: Callable[[int], int], last: int) -> int:
        """Take the same cycle again until something is due; return the number of engine steps."""
        if not cycle.is_closed or self._coming() is not cycle:
            return 0
        end = next_due(min(run.last_step, last + MOST_REPEATED * cycle.length))
        if any(self._is_observed(step) for step in range(last + 1, end + 1)):
            return 0
        most = (end - last) // cycle.length
        taken, is_other = self._steps.repeat(cycle.order, most) if most > 0 else (0, False)
        if is_other and self._take_cycle(cycle, last + (taken + 1) * cycle.length):
            taken += 1
            for name in cycle.names:
                self.schedule.stepped(name)
        return taken * cycle.length

    def _coming(self) -> "_Cycle":
        """Return the coming cycle."""
        position = self.schedule.position()
        cycle = self._cycles.get(position)
        if cycle is None:
            coming = self.schedule.coming(LONGEST_CYCLE)
            names = [name for due in coming for name in due]
            cycle = _Cycle(coming, self.stepper.states, is_possible=bool(names) and self._may_be_cycle(names))
            # Each level steps once, and no level that does not step is read.
            once = len(cycle.states) == len(names) and set(names).issuperset(self._steps.reads(names))
            cycle.is_closed = once and all(map(self._steps.is_closed, cycle.states))
            self._cycles[position] = cycle
        return cycle

    def _take_cycle(self, cycle: "_Cycle", last: int) -> bool:
        restarted = [(state, state.restarts) for state in cycle.states]
        draws: dict[str, list[tuple[Draw, ...]]] = {name: [] for name in cycle.names}
        taken = False
        try:
            for name, state in zip(cycle.names, cycle.order, strict=True):
                self.stepper.prepare(state)
                draws[name].append(state.draws.latest)
            taken = self._steps.run(cycle.names, draws, last)
        except Unsuitable:
            # Single steps may still be compiled; if not, that attempt stores the reason.
            cycle.is_possible = False
        finally:
            if not taken:  # nothing has changed: the eager steps use the same batches
                for state, restarts in restarted:
                    state.restarts = restarts
                    state.draws.prefetched.extend(draws[state.level.name])
        return taken

    def _wait(self, waits: bool) -> None:
        """Set whether steps and replays run eagerly until the next complete cycle."""
        if waits != self._waits:
            self._waits = waits
            for state in self.stepper.states.values():
                if isinstance(state.level.stepping.compiler, CompiledReplay):
                    state.level.stepping.compiler.is_paused = waits

    def _may_be_cycle(self, names: Sequence[str]) -> bool:
        states = self.stepper.states
        for name in names:
            level = states[name].level
            if name in self._steps.reasons:
                return False
            if states[name].history is not None and (level.lowers or not set(level.uppers).intersection(names)):
                return False  # later steps need its history
            if level.problem.scheduler is not None and names.count(name) > 1:
                return False  # the learning rate of its second step is not known
            if any(names.count(upper) > 1 for upper in level.links.noted_uppers):
                return False  # its variables before the second step are not known
        return all(states[read].history is None for read in self._steps.reads(names) if read not in names)


class _Cycle:
    """The steps up to the next step of a level with lowers.

    Args:
        coming: The levels that step in each engine step.
        states: The state of each level.
        is_possible: Whether the steps may be one graph.

    Attributes:
        is_closed: Whether nothing but the steps themselves changes anything from one such cycle to the next.
        names: The levels in the order in which they step.
        order: Their states, in this order.
        states: Their states, once each.
        ending: The levels that step in the last engine step.
        length: The number of engine steps.
    """

    def __init__(self, coming: list[list[str]], states: Mapping[str, LevelState], *, is_possible: bool) -> None:
        self.names = tuple(name for due in coming for name in due)
        self.order = [states[name] for name in self.names]
        self.states = [states[name] for name in dict.fromkeys(self.names)]
        self.ending = coming[-1] if coming else []
        self.length = len(coming)
        self.is_possible = is_possible
        self.is_closed = False
