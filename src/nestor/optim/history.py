"""The history of a level: what is kept of its steps, for responses that differentiate them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from nestor.autodiff.scope import Scope
from nestor.autodiff.torch_private import version
from nestor.data.draws import Draw
from nestor.optim.update import OffloadTo, State, Stored, Update, keep
from nestor.vectors import Params

_EMPTY: Mapping[Any, Any] = MappingProxyType({})

Buffers: TypeAlias = "Sequence[Tensor | None]"
"""Values of the buffers that a loss reads (``LevelLoss.buffer_values``)."""


@dataclass(frozen=True)
class HistorySpec:
    """What a response needs of the steps of a level.

    Attributes:
        window: How many of the last steps; None needs all steps since a level above last stepped.
        spacing: A state is kept before every so many steps; None keeps the state before the first step only.
        offload_to: Where states are kept.
        gradients: Whether the gradients of the steps are kept.
        input_gradients: Whether the last step's gradient in the variables of levels above is computed and kept.
        graphs: Whether the graphs of the steps' gradients are kept.
        slots: Whether states include the optimizer's memory.
        slots_after: Whether the optimizer's memory after the last step replaces the state before it, for a rule whose
            Jacobian follows from that memory.
    """

    window: int | None = None
    spacing: int | None = None
    offload_to: OffloadTo = None
    gradients: bool = False
    input_gradients: bool = False
    graphs: bool = False
    slots: bool = True
    slots_after: bool = False

    def count(self, steps: int) -> int:
        """Count the last steps that are needed out of ``steps``."""
        return steps if self.window is None else min(steps, self.window)


def merged(one: HistorySpec | None, other: HistorySpec | None) -> HistorySpec | None:
    """Return the specification that meets both."""
    if one is None or other is None:
        return one or other
    window = None if one.window is None or other.window is None else max(one.window, other.window)
    return HistorySpec(
        window=window,
        spacing=min((s for s in (one.spacing, other.spacing) if s is not None), default=None),
        offload_to=one.offload_to or other.offload_to,
        gradients=one.gradients or other.gradients,
        input_gradients=one.input_gradients or other.input_gradients,
        graphs=one.graphs or other.graphs,
        slots=one.slots or other.slots,
        slots_after=one.slots_after and other.slots_after,
    )


@dataclass(frozen=True)
class GradientGraph:
    """The graph of the gradient of one step, made when the step was taken.

    Attributes:
        theta: The variables, leaves.
        inputs: The variables of levels above by level name, leaves.
        gradient: The gradient.
        scope: The scope in which the graph was made.
    """

    theta: Params
    inputs: Mapping[str, Params]
    gradient: Sequence[Tensor | None]
    scope: Scope
    _versions: list[object] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._present_versions())

    def _present_versions(self) -> list[object]:
        return [version(t) for tensors in self.inputs.values() for t in tensors]

    @property
    def is_valid(self) -> bool:
        """Whether no level above has moved since: a step in place changes tensors that the graph saved."""
        return self._present_versions() == self._versions


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, described before it is taken, so that it can be taken again.

    Attributes:
        draws: Its batches.
        update: The rule, with the hyperparameters of that step.
        buffers: Values of the buffers that the level's loss reads, before each batch; empty means the present values.
        below: The histories of the levels below at that step.
        graph: The graph of its gradient, if that is kept.
    """

    draws: tuple[Draw, ...]
    update: Update
    buffers: Sequence[Buffers] = ()
    below: Histories = field(default_factory=dict)
    graph: GradientGraph | None = None


class LevelHistory(NamedTuple):
    """What the levels above need to know of a level.

    Attributes:
        draws: The batches of its last step.
        values: Its variables; None means the present ones.
        steps: The steps that led to them, oldest first.
        states: The states before some of these steps, by index. The state before the first step is among them, unless
            ``slots_after`` replaces it.
        uppers: The variables of levels above along these steps, for the levels that have moved since.
        gradients: The gradients of the last of these steps, oldest first, if they were kept.
        input_gradients: The gradient of the last step's objective in the variables of levels above, if it was kept.
        slots_after: The optimizer's memory after the last step, one mapping a variable, if no state is kept.
        planned: Whether the steps are still to be taken, from the present state.
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


Histories: TypeAlias = Mapping[str, LevelHistory]
"""A history of each level that is needed, by level name."""


class HistoryBuilder:
    """Builds the history of a level step by step, as far back as its response needs.

    An engine, its compiled steps, ``explain()`` and the memory forecast all build histories with this class.

    Args:
        spec: What the response needs.
    """

    def __init__(self, spec: HistorySpec) -> None:
        self.spec = spec
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self._steps: list[StepRecord] = []
        self._states: dict[int, Stored] = {}
        self._uppers: dict[str, Params] = {}
        self._gradients: list[Sequence[Tensor | None]] = []
        self._input_gradients: Mapping[str, Sequence[Tensor | None]] = _EMPTY

    def note(self, record: StepRecord, state: Callable[[], State], *, may_be_undone: bool = False) -> None:
        """Note a step that is about to be taken.

        Args:
            record: The step.
            state: Copies the present state; called only if that state is kept.
            may_be_undone: Whether :meth:`forget_last` may follow; the step before is then kept too.
        """
        spec = self.spec
        if spec.window == 1 and spec.spacing == 1 and not may_be_undone:
            # Free the last state before the next one is copied.
            self._steps, self._states, self._gradients = [], {}, []
        count = len(self._steps)
        if spec.slots_after and record.update.has_step_jacobian:
            self._states = {}
        elif not self._states or (spec.spacing is not None and count - max(self._states) >= spec.spacing):
            self._states[count] = keep(state(), spec.offload_to)
        self._steps.append(record)
        self._trim(spec)

    def _trim(self, spec: HistorySpec) -> None:
        if spec.window is None or not self._states:
            return
        needed = len(self._steps) - spec.window
        base = max((index for index in self._states if index <= needed), default=0)
        if base:
            self._steps = self._steps[base:]
            self._states = {index - base: state for index, state in self._states.items() if index >= base}

    @property
    def keeps_states(self) -> bool:
        """Whether a state is kept; else the optimizer's memory replaces it."""
        return bool(self._states)

    def keep_graph(self, graph: GradientGraph) -> None:
        """Keep the graph of the gradient of the step that was noted last."""
        self._steps[-1] = replace(self._steps[-1], graph=graph)

    def forget_last(self) -> None:
        """Remove the last step: it was not taken."""
        if self._steps:
            self._steps.pop()
            self._states.pop(len(self._steps), None)

    def took(self, gradient: Sequence[Tensor | None], input_gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Note the gradients of the step that was taken."""
        self._input_gradients = input_gradients
        if not self._states:
            self._steps = self._steps[-1:]
        if self.spec.gradients:
            self._gradients = [*self._gradients, gradient][-len(self._steps) :]

    def upper_moves(self, name: str, variables: Params) -> None:
        """Copy the variables of a level above before they change: the noted steps read these values."""
        if self._steps and name not in self._uppers:
            self._uppers[name] = [v.detach().clone() for v in variables]

    def load(self, history: LevelHistory) -> None:
        """Continue another history."""
        self._steps, self._states, self._uppers = list(history.steps), dict(history.states), dict(history.uppers)
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
            values: The variables, if they are not to be read later.
            slots: Returns the optimizer's memory; called only if it replaces a state.
        """
        if not self._steps:
            return LevelHistory(draws, values)
        return LevelHistory(
            draws,
            values,
            tuple(self._steps),
            dict(self._states),
            dict(self._uppers),
            tuple(self._gradients),
            self._input_gradients,
            slots_after=None if self._states else slots(),
        )
