"""Iterative differentiation: the derivative of the steps that were taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.optim.history import HistorySpec
from nestor.optim.state import OffloadTo, Stored, keep
from nestor.responses.lower_level import LowerLevel
from nestor.responses.response import Response
from nestor.responses.unrolling.reverse_sweep import ReverseSweep, forward_with_graphs
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

CHECKPOINTS = ("none", "step", "sqrt", "tree")
# Pieces of a segment: eight keep 7 log8(T) = 2.3 log2(T) states and walk log8(T) times through the steps.
_TREE = 8


@dataclass(frozen=True, kw_only=True)
class Unrolled(Response):
    r"""Differentiate the steps of the lower level's own optimizer, by replaying them in reverse.

    .. math:: s_{t+1} = U(s_t, \nabla_\theta G_t(\theta_t, \lambda)), \qquad
        \frac{d\theta_T}{d\lambda} = \sum_{t<T} \frac{\partial\theta_T}{\partial s_{t+1}}
        \frac{\partial s_{t+1}}{\partial\lambda}

    Exact for the steps that were taken: the optimizer's momentum and preconditioner, clipping, schedules, batches,
    random numbers and buffers are those of each step. An engine notes the steps since a level above last stepped, at
    most ``unroll_steps`` of them count; ``Program.hypergradient`` and ``best_response``, which know no past, take
    ``unroll_steps`` (or ``steps``, if that is more) steps ahead from the present variables and respond with where they
    lead. For a higher derivative (a level in the middle, exact nesting) one graph of all steps is built.

    Args:
        steps: Differentiate the last so many steps only; None goes back to the first.
        checkpoint: Which states are kept for ``T`` steps. ``"none"``: the graph of every step, made by the step itself:
            nothing is evaluated twice (where modules have buffers, it is). ``"step"``: the state
            before every step; one step's graph at a time, each step evaluated once more. ``"sqrt"``:
            :math:`2\sqrt{T}` states, two more evaluations. ``"tree"``: :math:`2.4 \log_2 T` states, about
            :math:`\log_8 T` more evaluations. All give the same numbers.
        offload_to: Where states are kept: ``None`` keeps them on the level's device; a device (``"cpu"``) or a folder
            (``pathlib.Path``) receives a copy.

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
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"Unrolled(steps={self.steps!r}) must be a positive integer, or None for all.")
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}) must be one of {', '.join(map(repr, CHECKPOINTS))}."
            )

    @property
    def history_spec(self) -> HistorySpec:
        """The steps of the window, and states as often as ``checkpoint`` says."""
        spacing = {"step": 1, "sqrt": math.isqrt(self.steps) if self.steps else None}.get(self.checkpoint, self.steps)
        return HistorySpec(self.steps, spacing, self.offload_to, graphs=self.checkpoint == "none")

    def pieces(self, total: int) -> Callable[[int], int] | None:
        """Say into how many pieces a segment of ``total`` steps, and each piece again, is cut."""
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
        state = trajectory.first_state(inputs)
        for step in trajectory.steps[:skipped]:
            state = step.advance(state, inputs)
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
            # Fresh nodes: the response is a function of the inputs alone, whatever else they depend on.
            given = algebra.fresh(inputs)
            return vjp(trajectory.with_graph(given), given, cotangent, create_graph=True)
        sweep = ReverseSweep(trajectory, inputs, self.pieces(len(trajectory.steps)), self.offload_to)
        return sweep.pull_back(cotangent)

    def describe(self) -> str:
        """Name the window and the checkpoints."""
        window = "" if self.steps is None else f"steps={self.steps}, "
        return f"Unrolled({window}checkpoint={self.checkpoint!r})"
