"""The history of a level: records of its steps and stored states, for responses that differentiate the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from nestor.autodiff.scope import Scope
from nestor.autodiff.torch_private import version
from nestor.data.draws import Draw
from nestor.optim.history_spec import HistorySpec
from nestor.optim.replay_guard import ReplayGuard
from nestor.optim.state import State, Stored, keep
from nestor.optim.update import Update
from nestor.vectors import Params

_EMPTY: Mapping[Any, Any] = MappingProxyType({})

Buffers: TypeAlias = Sequence[Tensor | None]
"""Values of the buffers that a loss reads (``LevelLoss.buffer_values``)."""


@dataclass(frozen=True)
class GradientGraph:
    """The graph of the gradient of one step, built when the step was taken.

    Attributes:
        theta: The variables, leaves.
        inputs: The variables of levels above by level name, leaves.
        gradient: The gradient.
        loss: The value of the objective.
        scope: The scope in which the graph was built.
        has_moved: Returns whether a constant of the loss has moved since the step.
        data: The tensors of the batches.
    """

    theta: Params
    inputs: Mapping[str, Params]
    gradient: Sequence[Tensor | None]
    loss: Tensor
    scope: Scope
    has_moved: Callable[[], bool] = bool
    data: Sequence[Tensor] = ()
    _versions: list[object] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._present_versions())

    def _present_versions(self) -> list[object]:
        return [version(t) for tensors in (*self.inputs.values(), self.data) for t in tensors]

    @property
    def is_valid(self) -> bool:
        """False if saved tensors have changed since: a level above has stepped, a constant moved, a batch changed."""
        return self._present_versions() == self._versions and not self.has_moved()


@dataclass(frozen=True)
class StepRecord:
    """Everything that determines one optimizer step, recorded before the step, so that the step can be replayed.

    Attributes:
        draws: The batches of the step.
        update: The rule, with the hyperparameters of the step.
        buffers: Values of the buffers that the level's loss reads, before each batch; empty means the current values.
        below: The histories of the levels below at the step.
        graph: The graph of the gradient; None if it is not stored.
        held: The variables, at the step, of levels above that are constants for the response, by level name, if they
            may have changed since.
    """

    draws: tuple[Draw, ...]
    update: Update
    buffers: Sequence[Buffers] = ()
    below: Histories = field(default_factory=dict)
    graph: GradientGraph | None = None
    held: Mapping[str, Params] = field(default_factory=dict)


class LevelHistory(NamedTuple):
    """The last steps of a level, for the responses that differentiate them.

    Attributes:
        draws: The batches of the last step.
        values: The variables of the level; None means the current ones.
        steps: The steps that led to the variables, oldest first.
        states: The stored states before some of these steps, by index of the step. The state before the first step is
            among them, unless ``slots_after`` replaces it.
        uppers: For each level above that has stepped since, its variables at the last steps, if noted.
        gradients: The gradients of the last of these steps, oldest first, if stored.
        input_gradients: The gradient of the last step's objective with respect to the variables of levels above, by
            level name, if stored.
        slots_after: The optimizer's memory after the last step, one mapping for each variable, if no state is stored.
        planned: True if the steps have not been taken yet; they start from the current state.
        guard: Compares replays with the recorded states; None if nothing is compared.
        restarts: True if planned steps start from a level above (``Problem(init=...)``).
    """

    draws: tuple[Draw, ...]
    values: Params | None = None
    steps: Sequence[StepRecord] = ()
    states: Mapping[int, Stored] = _EMPTY
    uppers: Mapping[str, Params] = _EMPTY
    gradients: Sequence[Sequence[Tensor | None]] = ()
    input_gradients: Mapping[str, Sequence[Tensor | None]] = _EMPTY
    slots_after: Sequence[Mapping[str, Any]] | None = None
    planned: bool = False
    guard: ReplayGuard | None = None
    restarts: bool = False


Histories: TypeAlias = Mapping[str, LevelHistory]
"""Histories of levels, by level name."""


class HistoryBuilder:
    """Builds the history of a level step by step, as far back as its response needs.

    An engine, its compiled steps, ``explain()`` and the memory forecast all build histories with this class.

    Args:
        spec: What the response needs.

    Attributes:
        guard: Compares replays with the recorded states, while the variables are those after the last step.
    """

    def __init__(self, spec: HistorySpec) -> None:
        self.spec = spec
        self.guard: ReplayGuard | None = None
        self.clear()

    def clear(self) -> None:
        """Remove all steps."""
        self._steps: list[StepRecord] = []
        self._states: dict[int, Stored] = {}
        self._gradients: list[Sequence[Tensor | None]] = []
        self._input_gradients: Mapping[str, Sequence[Tensor | None]] = _EMPTY

    def note(
        self, record: StepRecord, state: Callable[[], State], *, remaining: int = 1, may_be_undone: bool = False
    ) -> None:
        """Record a step before it is taken.

        Args:
            record: The step.
            state: Returns a copy of the current state; called only if the state is stored.
            remaining: Number of steps, with this one, until a level above steps.
            may_be_undone: Whether :meth:`forget_last` may follow; the previous step is then kept too.
        """
        spec = self.spec
        if spec.window == 1 and spec.spacing == 1 and not may_be_undone:
            # Only the new step is needed: free the last state before the next one is copied.
            self._steps, self._states, self._gradients = [], {}, []
        count = len(self._steps)
        if spec.slots_after and record.update.has_step_jacobian:
            self._states = {}  # the step Jacobian follows from the optimizer's memory after the step
        elif not self._states or self._is_due(count, count + remaining):
            self._states[count] = keep(state(), spec.offload_to)
        self._steps.append(record)
        self._trim(spec)

    def _is_due(self, count: int, total: int) -> bool:
        spacing = self.spec.spacing_of(total)
        return spacing is not None and count - max(self._states) >= spacing

    def _trim(self, spec: HistorySpec) -> None:
        if spec.window is None or not self._states:
            return
        # Steps before the window are dropped. A replay starts at a stored state, so the cut is at the last state that
        # is not after the start of the window. Indices of states count from the first step that remains.
        needed = len(self._steps) - spec.window
        base = max((index for index in self._states if index <= needed), default=0)
        if base:
            self._steps = self._steps[base:]
            self._states = {index - base: state for index, state in self._states.items() if index >= base}

    @property
    def is_empty(self) -> bool:
        """Whether no step is recorded."""
        return not self._steps

    @property
    def noted_state(self) -> State | None:
        """The state before the last recorded step, if it is stored in place."""
        stored = None if self.spec.offload_to is not None else self._states.get(len(self._steps) - 1)
        return None if stored is None else stored()

    @property
    def keeps_states(self) -> bool:
        """Whether a state is stored; otherwise the optimizer's memory after the step replaces it."""
        return bool(self._states)

    def keep_graph(self, graph: GradientGraph) -> None:
        """Store the graph of the gradient of the last recorded step."""
        self._steps[-1] = replace(self._steps[-1], graph=graph)

    def forget_last(self) -> None:
        """Remove the last step, which was not taken."""
        if self._steps:
            self._steps.pop()
            self._states.pop(len(self._steps), None)

    def took(self, gradient: Sequence[Tensor | None], input_gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Record the gradients of the last step, after it was taken."""
        self._input_gradients = input_gradients
        if not self._states:
            self._steps = self._steps[-1:]
        if self.spec.gradients:
            self._gradients = [*self._gradients, gradient][-len(self._steps) :]

    def load(self, history: LevelHistory) -> None:
        """Replace all steps by those of a history."""
        self._steps, self._states = list(history.steps), dict(history.states)
        self._gradients, self._input_gradients = list(history.gradients), history.input_gradients

    def build(
        self,
        draws: tuple[Draw, ...],
        values: Params | None = None,
        slots: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
    ) -> LevelHistory:
        """Return the history.

        Args:
            draws: The batches of the last step.
            values: Copies of the variables; None if the history is used before the variables change.
            slots: Returns the optimizer's memory; called only if the memory replaces a state.
        """
        if not self._steps:
            return LevelHistory(draws, values)
        return LevelHistory(
            draws,
            values,
            tuple(self._steps),
            dict(self._states),
            gradients=tuple(self._gradients),
            input_gradients=self._input_gradients,
            slots_after=None if self._states else slots(),
            guard=self.guard if values is None else None,
        )
