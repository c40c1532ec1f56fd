"""Iterative differentiation in reverse mode: the derivative of the steps that were taken."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.errors import check_options
from nestor.optim.history import HistorySpec
from nestor.optim.state import OffloadTo, State, Stored, keep
from nestor.responses.response import Response
from nestor.responses.unrolling.rule_step import Cotangents, Pulled
from nestor.responses.unrolling.step import StepVJP
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.responses.work import Work
from nestor.vectors import Params, algebra


@dataclass
class ReverseSweep:
    """Pulls a cotangent back through the steps of a trajectory, from the last step to the first.

    The sweep is recursive. It splits a segment of steps into pieces, replays the segment forward, and stores the state
    before each piece. It then sweeps through the pieces in the same way, the last one first. States in the history are
    not recomputed. Only one step's graph is in memory at a time.

    Args:
        trajectory: The steps.
        inputs: The tensors of the levels above.
        pieces: Returns the number of pieces for the length of a segment; None keeps the graphs of all steps.
        offload_to: Where states are stored.
        theta: The variables after the last step, as the run has recorded them; None if it has not.

    Attributes:
        held: Number of stored states, including those of the history.
        most: The largest value of ``held`` so far.
    """

    trajectory: Trajectory
    inputs: Params
    pieces: Callable[[int], int] | None
    offload_to: OffloadTo = None
    theta: Params | None = None

    def __post_init__(self) -> None:
        self._guard = None if self.theta is None else self.trajectory.history.guard
        self._recorded: dict[int, Params] = {} if self.theta is None else {len(self.trajectory.steps): self.theta}
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
            vjps = forward_with_graphs(trajectory, first, self._given)
            self._compare(len(vjps) - 1, vjps[-1])
            before = self._through(vjps, cotangent)
        else:
            before = self._reverse(0, len(trajectory.steps), lambda: first, cotangent)
        if self._guard is not None and self.theta is not None:
            self._guard.verify(partial(trajectory.replayed_as_taken, self._given, self.theta))
        if trajectory.init_indices is not None:
            for index, value in zip(trajectory.init_indices, before, strict=False):
                self._add(index, None if value is None else value.sum_to_size(self.inputs[index].shape))
        return self._total

    def _through(
        self, vjps: Sequence[StepVJP], cotangents: Cotangents, *, retain_graph: bool = False
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
        starts = range(low, high, length)
        kept = self._walk(starts, stored)
        for start in reversed(starts):
            cotangents = self._reverse(start, min(start + length, high), kept.pop(start), cotangents)
            self.held -= start != low and start not in self.trajectory.history.states
        return list(cotangents)

    def _pull_step(self, number: int, state: State, cotangents: Cotangents) -> Pulled:
        step = self.trajectory.steps[number]
        if self._guard is None or number + 1 not in self._recorded:
            pulled = step.pull_back(state, self._given, cotangents)
        else:
            step_vjp = step.vjp(state, self._given)
            self._compare(number, step_vjp)
            pulled = step_vjp.pull_back(cotangents)
        if number in self.trajectory.history.states:
            self._recorded = {number: state.params}
        return pulled

    def _compare(self, number: int, step_vjp: StepVJP) -> None:
        if self._guard is not None:
            recorded = self._recorded[number + 1]
            self._guard.compare(number, step_vjp.rule.differentiated.params, recorded)

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


CHECKPOINTS = ("none", "step", "sqrt", "tree")
# Number of pieces of a segment. Eight pieces store 7 log8(T) = 2.3 log2(T) states and replay all steps log8(T) times.
_TREE = 8


@dataclass(frozen=True, kw_only=True)
class Unrolled(Response):
    r"""Differentiate the steps of the lower level's own optimizer, by replaying them in reverse.

    .. math:: s_{t+1} = U(s_t, \nabla_\theta G_t(\theta_t, \lambda)), \qquad
        \frac{d\theta_T}{d\lambda} = \sum_{t<T} \frac{\partial\theta_T}{\partial s_{t+1}}
        \frac{\partial s_{t+1}}{\partial\lambda}

    Exact for the steps that were taken: the optimizer's momentum and preconditioner, clipping, schedules, batches,
    random numbers, buffers and frozen tensors that move (a teacher) are those of each step. An engine records the steps
    since a level above last stepped.
    ``Program.hypergradient`` and ``best_response`` have no recorded steps: they take ``unroll_steps`` (or ``steps``, if
    larger) steps from the current variables, and the response is the result of these steps. For a higher derivative (a
    level in the middle, exact nesting), one graph of all steps is built.

    Args:
        steps: Number of last steps to differentiate; None differentiates all steps.
        checkpoint: What is stored for ``T`` steps. All choices give the same result. ``"none"``: the graph of every
            step, built when the step is taken; nothing is evaluated twice (except in modules with buffers).
            ``"step"``: the state before every step; one step's graph at a time, one more evaluation of each step.
            ``"sqrt"``: :math:`2\sqrt{T}` states, two more evaluations. ``"tree"``: :math:`2.4 \log_2 T` states, about
            :math:`\log_8 T` more evaluations.
        offload_to: Where states are stored: ``None`` stores them on the level's device; a device (``"cpu"``) or a
            folder (``pathlib.Path``) receives a copy.

    Raises:
        ValueError: If ``steps`` is not positive or ``checkpoint`` unknown.

    References: Maclaurin, Duvenaud, Adams, Gradient-based hyperparameter optimization through reversible learning,
    ICML 2015. Shaban et al., Truncated back-propagation for bilevel optimization, AISTATS 2019. Engstrom et al.,
    Optimizing ML training with metagradient descent, 2025 (the tree).
    """

    steps: int | None = None
    checkpoint: str = "step"
    offload_to: OffloadTo = None

    def __post_init__(self) -> None:
        check_options(self, counts=["steps"])
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}) must be one of {', '.join(map(repr, CHECKPOINTS))}."
            )

    @property
    def differentiates_steps(self) -> bool:
        """True: the steps are taken again."""
        return True

    @property
    def history_spec(self) -> HistorySpec:
        """The last ``steps`` steps, with the spacing of states that ``checkpoint`` needs."""
        spacing = {"step": 1, "sqrt": math.isqrt(self.steps) if self.steps else None}.get(self.checkpoint, self.steps)
        return HistorySpec(self.steps, spacing, self.offload_to, graphs=self.checkpoint == "none")

    def pieces(self, total: int) -> Callable[[int], int] | None:
        """Return a function from the length of a segment to its number of pieces, for ``total`` steps in all."""
        if self.checkpoint == "none":
            return None
        if self.checkpoint == "step":
            return lambda length: length
        if self.checkpoint == "tree":
            return lambda length: min(_TREE, length)
        root = math.ceil(math.sqrt(total))
        return lambda length: root if length > root else length

    def take_planned_steps(self, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Take all planned steps, and keep the last ``steps`` of them."""
        trajectory = lower.needed_trajectory(self.describe())
        if not trajectory.history.planned:
            return lower, theta
        records = trajectory.history.steps
        skipped = max(len(records) - self.steps, 0) if self.steps is not None else 0
        state = trajectory.replayed(trajectory.first_state(inputs), inputs, stop=skipped)
        states: dict[int, Stored] = {0: keep(state, self.offload_to)}
        init_indices = None if skipped else trajectory.init_indices
        taken = trajectory.with_steps(records[skipped:], states, init_indices=init_indices)
        if self.checkpoint == "none":
            vjps = forward_with_graphs(taken, state, inputs)
            return replace(lower, trajectory=replace(taken, vjps=vjps)), vjps[-1].state_after().params
        for index, step in enumerate(taken.steps):
            if self.checkpoint == "step" and index:
                states[index] = keep(state, self.offload_to)
            state = step.advance(state, inputs)
        return replace(lower, trajectory=taken), state.params

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Sweep through the steps in reverse; see :class:`Response`."""
        trajectory = lower.needed_trajectory(self.describe())
        if self.steps is not None:
            trajectory = trajectory.truncated(self.steps, inputs)
        if torch.is_grad_enabled():
            # Fresh nodes: the derivative is partial, although an input may be a function of another input.
            given = algebra.fresh(inputs)
            return vjp(trajectory.with_graph(given), given, cotangent, create_graph=True)
        sweep = ReverseSweep(trajectory, inputs, self.pieces(len(trajectory.steps)), self.offload_to, theta)
        return sweep.pull_back(cotangent)

    def work(self, steps: int, dimension: int) -> Work:
        """Return one gradient for each step that is differentiated; replays without a derivative are not counted."""
        return Work(gradients=steps if self.steps is None else min(steps, self.steps))

    def describe(self) -> str:
        window = "" if self.steps is None else f"steps={self.steps}, "
        return f"Unrolled({window}checkpoint={self.checkpoint!r})"
