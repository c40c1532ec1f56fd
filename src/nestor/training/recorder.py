"""The past of a level, noted while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from nestor.levels.level import Draw, Level
from nestor.levels.moment import Buffers, Moment, Moments, Record
from nestor.optim.recording import Recording
from nestor.optim.state import State, Stored, keep
from nestor.optim.update import Update
from nestor.responses.unrolling.trajectory import StepGraph
from nestor.vectors.algebra import Params


class Recorder:
    """Notes the steps of a level since a level above last moved, as far back as its response needs.

    Args:
        level: The level.
        recording: What its response needs.

    Attributes:
        gradients: The gradients of the last steps, if the response needs them.
    """

    def __init__(self, level: Level, recording: Recording) -> None:
        self.level = level
        self.recording = recording
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.gradients: list[Sequence[Tensor | None]] = []
        self._records: list[Record] = []
        self._states: dict[int, Stored] = {}
        self._uppers: dict[str, Params] = {}
        self.input_gradients: Mapping[str, Sequence[Tensor | None]] = {}

    def note(self, draws: tuple[Draw, ...], rule: Update, state: State | None, below: Moments) -> list[Buffers]:
        """Note a step that is about to be taken; return the list that takes its buffers' values.

        Without a ``state``, what the optimizer keeps after the step will do.
        """
        count = len(self._records)
        spacing = self.recording.spacing
        if state is None:
            self._states = {}
        elif not self._states or (spacing is not None and count - max(self._states) >= spacing):
            self._states[count] = keep(state, self.recording.place)
        buffers: list[Buffers] = []
        self._records.append(Record(draws, rule, buffers, below))
        self._trim()
        return buffers

    def make_room(self) -> None:
        """Let go of what will not be needed once another step is noted, before its state is copied."""
        if self.recording.window == 1 and self.recording.spacing == 1:
            self._records, self._states, self.gradients = [], {}, []

    def _trim(self) -> None:
        if self.recording.window is None or not self._states:
            return
        needed = len(self._records) - self.recording.window
        base = max((index for index in self._states if index <= needed), default=0)
        if base:
            self._records = self._records[base:]
            self._states = {index - base: state for index, state in self._states.items() if index >= base}

    def took(self, gradient: Sequence[Tensor | None], inputs: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Note the gradient of the step that was taken, and that in the variables of levels above."""
        self.input_gradients = inputs
        if not self._states:
            self._records = self._records[-1:]
        if self.recording.gradient:
            self.gradients = [*self.gradients, gradient][-len(self._records) :]

    def keep_graph(self, kept: StepGraph) -> None:
        """Keep the graph of the gradient of the step that was noted last."""
        self._records[-1] = replace(self._records[-1], kept=kept)

    def forget_last(self) -> None:
        """Take back the last note: its step was not taken."""
        if self._records:
            self._records.pop()
            self._states.pop(len(self._records), None)

    def upper_moves(self, name: str, variables: Params) -> None:
        """Keep the variables of a level above as they were along the steps, before they change."""
        if self._records and name not in self._uppers:
            self._uppers[name] = [v.detach().clone() for v in variables]

    def load(self, moment: Moment) -> None:
        """Take over what another recorder had noted."""
        self._records = list(moment.records)
        self._states = dict(moment.states)
        self._uppers = dict(moment.uppers)
        self.gradients = list(moment.gradients)
        self.input_gradients = moment.input_gradients

    def moment(self, draws: tuple[Draw, ...], values: Params | None = None, *, once: bool = False) -> Moment:
        """Return what was noted."""
        return Moment(
            draws,
            values,
            tuple(self._records),
            dict(self._states),
            dict(self._uppers),
            tuple(self.gradients),
            input_gradients=self.input_gradients,
            once=once,
        )
