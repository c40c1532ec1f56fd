"""The derivative of a trajectory, step by step in reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from nestor.optim.state import OffloadTo, State, Stored, keep
from nestor.responses.unrolling.step import Cotangents, Pulled, StepVJP
from nestor.responses.unrolling.trajectory import Trajectory
from nestor.vectors.algebra import Params


@dataclass
class ReverseSweep:
    """Pulls a cotangent back through the steps of a trajectory, from the last step to the first.

    A segment of steps is cut into pieces. The sweep walks forward through the segment and keeps the state before each
    piece; then it does the pieces, the last one first, each in the same way. States that the history has kept are not
    computed again. One step's graph is alive at a time.

    Args:
        trajectory: The steps.
        inputs: The tensors of the levels above.
        pieces: Into how many pieces a segment of so many steps is cut; None keeps the graphs of all steps.
        offload_to: Where states are kept.

    Attributes:
        held: States held at present, those of the history included.
        most: Most states held at a time.
    """

    trajectory: Trajectory
    inputs: Params
    pieces: Callable[[int], int] | None
    offload_to: OffloadTo = None

    def __post_init__(self) -> None:
        self._given = [i.detach() for i in self.trajectory.inputs_then(self.inputs)]
        self._total: list[Tensor | None] = [None] * len(self.inputs)
        self.held = self.most = len(self.trajectory.history.states)

    def pull_back(self, cotangent: Cotangents) -> list[Tensor | None]:
        """Map a cotangent on the last variables to cotangents on the inputs."""
        trajectory = self.trajectory
        first = trajectory.first_state(self._given)
        if not trajectory.steps:
            before = list(cotangent)
        elif trajectory.vjps is not None:
            before = self._through(trajectory.vjps, cotangent, retain_graph=True)
        elif self.pieces is None:
            before = self._through(forward_with_graphs(trajectory, first, self._given), cotangent)
        else:
            before = self._reverse(0, len(trajectory.steps), lambda: first, cotangent)
        if trajectory.init_indices is not None:
            for index, value in zip(trajectory.init_indices, before, strict=False):
                self._add(index, None if value is None else value.sum_to_size(self.inputs[index].shape))
        return self._total

    def _through(
        self, vjps: Sequence[StepVJP], cotangents: Cotangents, *, retain_graph: bool = False
    ) -> list[Tensor | None]:
        before = list(cotangents)
        for vjp in reversed(vjps):
            before = self._collect(vjp.pull_back(before, retain_graph=retain_graph))
        return before

    def _collect(self, pulled: Pulled) -> list[Tensor | None]:
        """Add a step's cotangents on the inputs to the total; return those on the state before."""
        before, inputs = pulled
        for index, value in enumerate(inputs):
            self._add(index, value)
        return before

    def _reverse(self, low: int, high: int, stored: Stored, cotangents: Cotangents) -> list[Tensor | None]:
        assert self.pieces is not None
        if high - low == 1:
            return self._collect(self.trajectory.steps[low].pull_back(stored(), self._given, cotangents))
        length = -(-(high - low) // self.pieces(high - low))
        starts = range(low, high, length)
        kept = self._walk(starts, stored)
        for start in reversed(starts):
            cotangents = self._reverse(start, min(start + length, high), kept.pop(start), cotangents)
            self.held -= start != low and start not in self.trajectory.history.states
        return list(cotangents)

    def _walk(self, starts: range, stored: Stored) -> dict[int, Stored]:
        """Return the states before all ``starts``, of which the first is ``stored``."""
        known = self.trajectory.history.states
        kept = {starts[0]: stored}
        at, state = starts[0], None  # None: the state at this index is stored, and not loaded yet
        for target in starts[1:]:
            if target in known:
                kept[target], at, state = known[target], target, None
                continue
            # Continue from the last state that the history kept on the way, if there is one.
            nearest = max((index for index in known if at < index < target), default=None)
            if nearest is not None:
                at, state = nearest, known[nearest]()
            state = kept[at]() if state is None else state
            for index in range(at, target):
                state = self.trajectory.steps[index].advance(state, self._given)
            at = target
            kept[target] = keep(state, self.offload_to)
            self.held += 1
            self.most = max(self.most, self.held)
        return kept

    def _add(self, index: int, value: Tensor | None) -> None:
        held = self._total[index]
        self._total[index] = value if held is None else held if value is None else held + value


def forward_with_graphs(trajectory: Trajectory, state: State, given: Params) -> list[StepVJP]:
    """Take all steps and keep the graph of each."""
    vjps = [trajectory.steps[0].vjp(state, given)]
    for _, step in pairwise(trajectory.steps):
        vjps.append(step.vjp(vjps[-1].state_after(), given))
    return vjps
