"""Iterative differentiation in reverse mode: the derivative of the steps that were taken."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.errors.options import check_options
from nestor.optim.history_spec import HistorySpec, Pieces
from nestor.optim.state import OffloadTo, Stored, keep
from nestor.responses.response import Response
from nestor.responses.unrolling.reverse_sweep import ReverseSweep, forward_with_graphs
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.vectors import Params, algebra

CHECKPOINTS = ("none", "step", "sqrt", "tree")
# Eight pieces store 7 log8(T) = 2.3 log2(T) states and replay all steps log8(T) times.
_PIECES = {"sqrt": Pieces(), "tree": Pieces(most=8)}


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
            step's gradient, built when the step is taken; nothing is evaluated twice (except in modules with buffers).
            ``"step"``: the state before every step, one more evaluation of each step, with one graph at a time; with
            ``keep_graphs`` the graphs in place of the states.
            ``"sqrt"``: :math:`2\sqrt{T}` states, one more evaluation with ``keep_graphs``, else two. ``"tree"``:
            :math:`2.4 \log_2 T` states, about :math:`\log_8 T` more evaluations, of which ``keep_graphs`` saves one. An
            engine stores the first states of both during the run.
        offload_to: Where states are stored: ``None`` stores them on the level's device; a device (``"cpu"``) or a
            folder (``pathlib.Path``) receives a copy.
        keep_graphs: Whether the graphs of gradients are kept. ``"step"`` keeps those of all steps, built when the steps
            are taken, in place of the states. ``"sqrt"`` and ``"tree"`` replay the steps between two stored states
            once, with the graphs in memory (those of :math:`\sqrt{T}`, or of eight steps); False replays them twice,
            with one graph at a time. None keeps the graphs if one of them is not larger than the state of the level, or
            if together they take at most 512 MiB. In an engine, ``"step"`` then keeps none until a level above has
            first stepped, so that the first replays are compared with the run, and none with ``offload_to``. Compiled
            steps and several processes keep none; if told to, they build them for the response.

    Raises:
        ValueError: If ``steps`` is not positive, ``checkpoint`` unknown, or ``keep_graphs`` False with ``"none"``.

    References: Maclaurin, Duvenaud, Adams, Gradient-based hyperparameter optimization through reversible learning,
    ICML 2015. Shaban et al., Truncated back-propagation for bilevel optimization, AISTATS 2019. Engstrom et al.,
    Optimizing ML training with metagradient descent, 2025 (the tree).

    Example:
        >>> theta, weight = torch.nn.Parameter(torch.tensor(0.0)), torch.tensor(2.0, requires_grad=True)
        >>> sgd, response = torch.optim.SGD([theta], lr=0.25), nestor.Unrolled(steps=3)
        >>> last = nestor.best_response(lambda t, w: (t - w) ** 2, theta, weight, response, optimizer=sgd)
        >>> last.item(), torch.autograd.grad(last, weight)  # three steps from 0 towards 2: 2 (1 - 0.5^3)
        (1.75, (tensor(0.8750),))
    """

    steps: int | None = None
    checkpoint: str = "step"
    offload_to: OffloadTo = None
    keep_graphs: bool | None = None

    def __post_init__(self) -> None:
        check_options(self, counts=["steps"])
        if self.checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}) must be one of {', '.join(map(repr, CHECKPOINTS))}."
            )
        if self.checkpoint == "none" and self.keep_graphs is False:
            raise ValueError(
                "Unrolled(checkpoint='none') keeps the graphs of all steps, and nothing else: it has no "
                "keep_graphs=False. Write checkpoint='step' for one graph at a time."
            )

    @property
    def differentiates_steps(self) -> bool:
        """True: the steps are taken again."""
        return True

    @property
    def history_spec(self) -> HistorySpec:
        """The last ``steps`` steps, with the spacing of states that ``checkpoint`` needs."""
        if self.steps is None and self.checkpoint in _PIECES:
            return HistorySpec(pieces=_PIECES[self.checkpoint], offload_to=self.offload_to)
        spacing = {"step": 1, "sqrt": math.isqrt(self.steps or 1)}.get(self.checkpoint, self.steps)
        spec = HistorySpec(self.steps, spacing, offload_to=self.offload_to)
        if self.checkpoint == "none" or (self.checkpoint == "step" and self.keep_graphs):
            return spec.with_graphs()
        return replace(spec, graphs=None if self.checkpoint == "step" and self.keep_graphs is None else False)

    def pieces(self, total: int) -> Callable[[int], int] | None:
        """Return a function from the length of a segment to its number of pieces, for ``total`` steps in all."""
        if self.checkpoint == "none":
            return None
        if self.checkpoint == "step":
            return lambda length: length
        if self.checkpoint == "tree":
            return _PIECES["tree"].count
        root = _PIECES["sqrt"].count(total)
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
        spacing = self.history_spec.spacing_of(len(taken.steps))
        for index, step in enumerate(taken.steps):
            if index and spacing is not None and index % spacing == 0:
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
        # Without states between the steps, the graphs were kept, or are small enough to be built together.
        has_states = len(trajectory.history.states) > 1 or self.checkpoint != "step"
        pieces = self.pieces(len(trajectory.steps)) if has_states else None
        # Processes that share a batch must replay the same steps in the same order.
        keep_graphs = self.keep_graphs if trajectory.is_alone or self.keep_graphs else False
        if self.checkpoint not in _PIECES:
            keep_graphs = False
        return ReverseSweep(trajectory, inputs, pieces, self.offload_to, theta, keep_graphs).pull_back(cotangent)

    def for_counting(self, dimension: int) -> Response:
        """Return a response that keeps no graphs if it depends on their size."""
        return replace(self, keep_graphs=bool(self.keep_graphs) or self.checkpoint == "none")

    def work(self, steps: int, dimension: int) -> Work:
        """Return one gradient for each step that is differentiated; replays without a derivative are not counted."""
        return Work(gradients=steps if self.steps is None else min(steps, self.steps))

    def describe(self) -> str:
        window = "" if self.steps is None else f"steps={self.steps}, "
        return f"Unrolled({window}checkpoint={self.checkpoint!r})"
