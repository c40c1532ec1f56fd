"""The derivative of a trajectory, step by step in reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from nestor.optim.state import Place, State, Stored, keep
from nestor.responses.unrolling.trajectory import Cotangents, Link, Pulled, Trajectory
from nestor.vectors.algebra import Params


@dataclass
class Replay:
    """Pulls a cotangent back through the steps of a trajectory, from the last to the first.

    A segment of steps is cut into pieces; their first states are computed by walking forward and kept while the pieces
    are done, the last one first, each in the same way. States that the trajectory has kept are not computed again.
    One step's graph is alive at a time.

    Args:
        trajectory: The steps.
        inputs: The tensors of the levels above.
        pieces: Into how many pieces a segment of so many steps is cut; None keeps the graphs of all steps.
        place: Where states are kept.

    Attributes:
        held: States held at present, those of the trajectory included.
        most: Most states held at a time.
    """

    trajectory: Trajectory
    inputs: Params
    pieces: Callable[[int], int] | None
    place: Place = None

    def __post_init__(self) -> None:
        self._given = [i.detach() for i in self.trajectory.along(self.inputs)]
        self._total: list[Tensor | None] = [None] * len(self.inputs)
        self.held = self.most = len(self.trajectory.states)

    def pull_back(self, cotangent: Cotangents) -> list[Tensor | None]:
        """Map a cotangent on the last variables to cotangents on the inputs."""
        trajectory = self.trajectory
        first = trajectory.first(self._given)
        if not trajectory.steps:
            before = list(cotangent)
        elif self.pieces is None or trajectory.links is not None:
            before = self._through_links(self._links(first), cotangent)
        else:
            before = self._reverse(0, len(trajectory.steps), lambda: first, cotangent)
        if trajectory.start is not None:
            for index, value in zip(trajectory.start, before, strict=False):
                self._add(index, None if value is None else value.sum_to_size(self.inputs[index].shape))
        return self._total

    def _links(self, state: State) -> Sequence[Link]:
        if self.trajectory.links is not None:
            return self.trajectory.links
        return roll_out(self.trajectory, state, self._given)

    def _through_links(self, links: Sequence[Link], cotangents: Cotangents) -> list[Tensor | None]:
        before = list(cotangents)
        for link in reversed(links):
            before = self._count(link.pull_back(before))
        return before

    def _count(self, pulled: Pulled) -> list[Tensor | None]:
        before, inputs = pulled
        for index, value in enumerate(inputs):
            self._add(index, value)
        return before

    def _reverse(self, low: int, high: int, stored: Stored, cotangents: Cotangents) -> list[Tensor | None]:
        assert self.pieces is not None
        if high - low == 1:
            return self._count(self.trajectory.steps[low].pull_back(stored(), self._given, cotangents))
        length = -(-(high - low) // self.pieces(high - low))
        starts = range(low, high, length)
        kept = self._walk(starts, stored)
        for start in reversed(starts):
            cotangents = self._reverse(start, min(start + length, high), kept.pop(start), cotangents)
            self.held -= start != low and start not in self.trajectory.states
        return list(cotangents)

    def _walk(self, starts: range, stored: Stored) -> dict[int, Stored]:
        """Walk forward from the first of the ``starts`` and keep the states before the others."""
        known = self.trajectory.states
        kept = {starts[0]: stored}
        here, state = starts[0], None
        for target in starts[1:]:
            if target in known:
                kept[target], here, state = known[target], target, None
                continue
            nearest = max((index for index in known if here < index < target), default=None)
            if nearest is not None:
                here, state = nearest, known[nearest]()
            state = kept[here]() if state is None else state
            for index in range(here, target):
                state = self.trajectory.steps[index].advance(state, self._given)
            here = target
            kept[target] = keep(state, self.place)
            self.held += 1
            self.most = max(self.most, self.held)
        return kept

    def _add(self, index: int, value: Tensor | None) -> None:
        held = self._total[index]
        self._total[index] = value if held is None else held if value is None else held + value


def roll_out(trajectory: Trajectory, state: State, given: Params) -> list[Link]:
    """Take all steps and keep the graph of each."""
    links = [trajectory.steps[0].link(state, given)]
    for before, step in pairwise(trajectory.steps):
        links.append(step.link(before.after(links[-1], given), given))
    return links
