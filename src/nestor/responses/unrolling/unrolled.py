"""Iterative differentiation: the derivative of the steps that were taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestor.errors import NestorError
from nestor.optim.recording import Recording
from nestor.optim.state import Place, Stored, keep
from nestor.responses.lower_level import LowerLevel, pull_back
from nestor.responses.response import Response
from nestor.responses.unrolling.replay import Replay, roll_out
from nestor.responses.unrolling.trajectory import Trajectory
from nestor.vectors.algebra import Params, fresh

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
        place: Where states are kept: ``None`` leaves them on the level's device, a device (``"cpu"``) or a folder
            (``pathlib.Path``) takes them there.

    Raises:
        ValueError: If ``steps`` is not positive or ``checkpoint`` unknown.

    References: Maclaurin, Duvenaud, Adams, Gradient-based hyperparameter optimization through reversible learning,
    ICML 2015. Shaban et al., Truncated back-propagation for bilevel optimization, AISTATS 2019. Engstrom et al.,
    Optimizing ML training with metagradient descent, 2025 (the tree).
    """

    steps: int | None = None
    checkpoint: str = "step"
    place: Place = None

    def __post_init__(self) -> None:
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"Unrolled(steps={self.steps!r}) must be a positive integer, or None for all.")
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}) must be one of {', '.join(map(repr, CHECKPOINTS))}."
            )

    @property
    def recording(self) -> Recording:
        """The steps of the window, and states as often as the checkpoints want them."""
        spacing = {"step": 1, "sqrt": math.isqrt(self.steps) if self.steps else None}.get(self.checkpoint, self.steps)
        return Recording(self.steps, spacing, self.place, graph=self.checkpoint == "none")

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

    def reach(self, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Take the steps that lie ahead."""
        trajectory = _trajectory(lower)
        if not trajectory.ahead:
            return lower, theta
        state = trajectory.first(inputs)
        skipped = max(len(trajectory.steps) - self.steps, 0) if self.steps is not None else 0
        for step in trajectory.steps[:skipped]:
            state = step.advance(state, inputs)
        rest = trajectory.steps[skipped:]
        start = None if skipped else trajectory.start
        if self.checkpoint == "none":
            taken = Trajectory(rest, {0: keep(state)}, start=start)
            links = roll_out(taken, state, inputs)
            final = rest[-1].after(links[-1], inputs)
            return replace(lower, trajectory=replace(taken, links=links)), final.params
        states: dict[int, Stored] = {0: keep(state, self.place)}
        for index, step in enumerate(rest):
            if self.checkpoint == "step" and index:
                states[index] = keep(state, self.place)
            state = step.advance(state, inputs)
        return replace(lower, trajectory=Trajectory(rest, states, start=start)), state.params

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Replay the steps in reverse; see :class:`Response`."""
        trajectory = _trajectory(lower)
        if self.steps is not None:
            trajectory = trajectory.last(self.steps, inputs)
        if torch.is_grad_enabled():
            # Fresh nodes: the response is a function of the inputs alone, whatever else they depend on.
            given = fresh(inputs)
            return pull_back(trajectory.connected(given), given, cotangent, create_graph=True)
        pieces = self.pieces(len(trajectory.steps))
        replay = Replay(trajectory, inputs, pieces, self.place)
        return replay.pull_back(cotangent)

    def describe(self) -> str:
        """Name the window and the checkpoints."""
        window = "" if self.steps is None else f"steps={self.steps}, "
        return f"Unrolled({window}checkpoint={self.checkpoint!r})"


def _trajectory(lower: LowerLevel) -> Trajectory:
    if lower.trajectory is None:
        raise NestorError(
            "Unrolled() differentiates optimizer steps, and none are known. In a program, give the level an optimizer; "
            "with best_response, pass optimizer=torch.optim.SGD([theta], lr=...) and Unrolled(steps=...).",
            level=lower.name,
        )
    return lower.trajectory
