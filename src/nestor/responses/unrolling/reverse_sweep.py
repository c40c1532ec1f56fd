"""The reverse sweep through the steps of a trajectory, with few states in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from nestor.autodiff.graph_size import with_graph_size
from nestor.autodiff.instruments import uncounted
from nestor.data.containers import tensors
from nestor.optim.kept_graphs import may_keep
from nestor.optim.state import OffloadTo, State, Stored, keep
from nestor.responses.unrolling.rule_step import Cotangents, Pulled
from nestor.responses.unrolling.step import Step, StepVJP, TakenStep
from nestor.responses.unrolling.trajectory import Trajectory
from nestor.vectors import Params


@dataclass
class ReverseSweep:
    """Pulls a cotangent back through the steps of a trajectory, from the last step to the first.

    The sweep is recursive. It splits a segment of steps into pieces, replays the segment forward, and stores the state
    before each piece. It then sweeps through the pieces in the same way, the last one first. States in the history are
    not recomputed. A piece that is not split further is replayed once with the graphs of all its gradients, or once
    without graphs and then step by step, with one graph in memory at a time.

    Args:
        trajectory: The steps.
        inputs: The tensors of the levels above.
        pieces: Returns the number of pieces for the length of a segment; None keeps the graphs of all steps.
        offload_to: Where states are stored.
        theta: The variables after the last step, as the run has recorded them; None if it has not.
        keep_graphs: Whether the graphs of the last pieces are kept; None keeps them if they are small, see
            :mod:`nestor.optim.kept_graphs`.

    Attributes:
        held: Number of stored states, including those of the history.
        most: The largest value of ``held`` so far.
    """

    trajectory: Trajectory
    inputs: Params
    pieces: Callable[[int], int] | None
    offload_to: OffloadTo = None
    theta: Params | None = None
    keep_graphs: bool | None = False

    def __post_init__(self) -> None:
        self._guard = None if self.theta is None else self.trajectory.history.guard
        self._recorded: dict[int, State] = {}
        if self.theta is not None:
            self._recorded[len(self.trajectory.steps)] = State(self.theta, ())
        self._given = [i.detach() for i in self.trajectory.inputs_then(self.inputs)]
        self._total: list[Tensor | None] = [None] * len(self.inputs)
        self.held = self.most = len(self.trajectory.history.states)

    def pull_back(self, cotangent: Cotangents) -> list[Tensor | None]:
        """Map a cotangent on the last variables to cotangents on the inputs."""
        trajectory = self.trajectory
        first = trajectory.first_state(self._given)
        self._examine_kept_graph(first)
        if not trajectory.steps:
            before = list(cotangent)
        elif trajectory.vjps is not None:
            before = self._through(trajectory.vjps, cotangent, retain_graph=True)
        elif self.pieces is None:
            vjps = forward_with_graphs(trajectory, first, self._given)
            self._compare(len(vjps) - 1, vjps[-1])
            before = self._through(vjps, cotangent)
        else:
            before = self._reverse(0, len(trajectory.steps), lambda: first, cotangent)
        self._verify()
        if trajectory.init_indices is not None:
            for index, value in zip(trajectory.init_indices, before, strict=False):
                self._add(index, None if value is None else value.sum_to_size(self.inputs[index].shape))
        return self._total

    def _examine_kept_graph(self, first: State) -> None:
        """Evaluate the first loss again, and from time to time its gradient, and compare it with its kept graph.

        A tensor that the graph contains may have changed since in a way that torch does not see (``tensor.data``).
        After a single step there is hardly an occasion: its gradient alone is evaluated, from time to time.
        """
        steps = self.trajectory.steps
        if self._guard is None or not steps or not steps[0].has_graph:
            return
        with uncounted():
            is_due = self._guard.is_due(len(steps))
            if is_due or (len(steps) > 1 and steps[0].has_other_value(first, self._given)):
                again = steps[0].without_graph().vjp(first, self._given)
                self._guard.compare(0, again.differentiated(), steps[0].vjp(first, self._given).differentiated())
                self._verify()

    def _verify(self) -> None:
        if self._guard is not None and self.theta is not None:
            self._guard.verify(partial(self.trajectory.replayed_as_taken, self._given, self.theta))

    def _through(
        self, vjps: Sequence[TakenStep], cotangents: Cotangents, *, retain_graph: bool = False
    ) -> list[Tensor | None]:
        before = list(cotangents)
        for step in reversed(vjps):
            before = self._collect(step.pull_back(before, retain_graph=retain_graph))
        return before

    def _collect(self, pulled: Pulled) -> list[Tensor | None]:
        """Add a step's cotangents on the inputs to the total; return those on the state before."""
        before, inputs = pulled
        for index, value in enumerate(inputs):
            self._add(index, value)
        return before

    def _reverse(self, low: int, high: int, stored: Stored, cotangents: Cotangents) -> list[Tensor | None]:
        """Pull cotangents back through the steps from ``low`` to before ``high``; ``stored`` is the state before."""
        assert self.pieces is not None
        if high - low == 1:
            return self._collect(self._pull_step(low, stored(), cotangents))
        length = -(-(high - low) // self.pieces(high - low))
        if length == 1 and self._may_keep_graphs(low):
            state = stored()
            vjps = self._walk_with_graphs(low, high, state)
            if len(vjps) == high - low:
                return self._pull_graphs(low, state, vjps, cotangents)
            kept = {low: stored, **self._walk(range(low + 1, high), keep(vjps.pop().state_after(), self.offload_to))}
        else:
            kept = self._walk(range(low, high, length), stored)
        for start in sorted(kept, reverse=True):
            cotangents = self._reverse(start, min(start + length, high), kept.pop(start), cotangents)
            self.held -= start != low and start not in self.trajectory.history.states
        return list(cotangents)

    def _may_keep_graphs(self, low: int) -> bool:
        """Return whether the graphs of a piece may be kept, whose states are not known."""
        return self.keep_graphs is not False and low + 1 not in self.trajectory.history.states

    def _walk_with_graphs(self, low: int, high: int, state: State) -> list[TakenStep]:
        """Take the steps of a piece with their graphs; only the first one, if the graphs are too large to be kept."""
        steps, undecided = self.trajectory.steps[low:high], self.keep_graphs is None
        taken, size = _take(steps[0], state, self._given, measure=undecided)
        if undecided:
            self.keep_graphs = size is not None and may_keep(size, state, len(steps))
        if not self.keep_graphs:
            self._hold()
            return [taken]
        found = [taken]
        for step in steps[1:]:
            found.append(_take(step, found[-1].state_after(), self._given, measure=False)[0])
        return found

    def _pull_graphs(
        self, low: int, state: State, vjps: Sequence[TakenStep], cotangents: Cotangents
    ) -> list[Tensor | None]:
        last = low + len(vjps) - 1
        if last + 1 in self._recorded:
            self._compare(last, vjps[-1])
        before = self._through(vjps, cotangents)
        if low in self.trajectory.history.states:
            self._recorded = {low: state}
        return before

    def _pull_step(self, number: int, state: State, cotangents: Cotangents) -> Pulled:
        step = self.trajectory.steps[number]
        if self._guard is None or number + 1 not in self._recorded:
            pulled = step.pull_back(state, self._given, cotangents)
        else:
            step_vjp = step.vjp(state, self._given)
            self._compare(number, step_vjp)
            pulled = step_vjp.pull_back(cotangents)
        if number in self.trajectory.history.states:
            self._recorded = {number: state}
        return pulled

    def _compare(self, number: int, step_vjp: TakenStep) -> None:
        if self._guard is not None:
            recorded = self._recorded[number + 1]
            self._guard.compare(number, step_vjp.differentiated(), recorded)

    def _walk(self, starts: range, stored: Stored) -> dict[int, Stored]:
        """Replay steps forward; return the states before all ``starts``, of which the first is ``stored``."""
        known = self.trajectory.history.states
        kept = {starts[0]: stored}
        # ``state`` is the state before step ``at``. None means that it is in ``kept[at]`` and has not been loaded: a
        # state on a disk or another device is loaded only if the next piece is replayed from it.
        at, state = starts[0], None
        for target in starts[1:]:
            if target in known:
                kept[target], at, state = known[target], target, None
                continue
            # Skip the steps up to the last state of the history before the target, if there is one.
            nearest = max((index for index in known if at < index < target), default=None)
            if nearest is not None:
                at, state = nearest, known[nearest]()
            state = kept[at]() if state is None else state
            state = self.trajectory.replayed(state, self._given, at, target)
            at = target
            kept[target] = keep(state, self.offload_to)
            self._hold()
        return kept

    def _hold(self) -> None:
        self.held += 1
        self.most = max(self.most, self.held)

    def _add(self, index: int, value: Tensor | None) -> None:
        held = self._total[index]
        self._total[index] = value if held is None else held if value is None else held + value


def forward_with_graphs(trajectory: Trajectory, state: State, given: Params) -> list[StepVJP]:
    """Take all steps and keep the graph of each."""
    vjps = [trajectory.steps[0].vjp(state, given)]
    for _, step in pairwise(trajectory.steps):
        vjps.append(step.vjp(vjps[-1].state_after(), given))
    return vjps


def _take(step: Step, state: State, given: Params, *, measure: bool) -> tuple[TakenStep, int | None]:
    """Take a step with its own graph; with ``measure``, count the bytes of the graph, if it can be observed."""
    if step.compiler is not None and (found := step.compiler.vjp(step, state, given)) is not None:
        return found
    if not measure:
        return step.vjp(state, given), None

    def held() -> list[Tensor]:
        return [*state.params, *given, *(t for draw in step.record.draws for t in tensors(draw.batch))]

    return with_graph_size(lambda: step.vjp(state, given), held)
