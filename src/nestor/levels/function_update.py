"""An update rule written by the user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from nestor.errors import NestorError
from nestor.levels.reader import Reader, replacements
from nestor.optim.rules import clip
from nestor.optim.state import State
from nestor.optim.update import Inputs, Update
from nestor.vectors import LOCAL, algebra


@dataclass(frozen=True, eq=False)
class FunctionUpdate(Update):
    """The rule ``update(params, grads, state, level, ...) -> (params, state)``; levels are passed as modules, by name.

    An argument ``step`` receives the number of steps that the level took before this one.

    ``params`` are the level's variables in the order of ``module.named_parameters()``. ``grads`` contains zeros for a
    variable that the objective does not depend on. ``state`` is None at the first step, then the state that the last
    step returned: None, a mapping of tensors, or a list of such mappings.

    Attributes:
        level: Name of the level that the rule steps.
        where: The function, as ``name (file:line)``.
        reader: Calls the function.
        slots: For each level that the function reads, the names of the level's variables within the reader.
        clip_norm: Largest norm of the gradient; None does not clip.
        steps: Number of steps that the level took before this one.
    """

    level: str
    where: str
    reader: Reader
    slots: Mapping[str, Sequence[tuple[str, ...]]]
    clip_norm: float | None = None
    steps: int = 0

    @property
    def takes_step(self) -> bool:  # type: ignore[override]
        return self.reader.takes_step

    def at_step(self, steps: int) -> Self:
        return replace(self, steps=steps) if self.takes_step else self

    def differentiable_step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        params = list(state.params)
        known = algebra.zeros_for_none(clip(LOCAL, grads, self.clip_norm), params)
        read = {name: values for name, values in inputs.items() if name in self.slots}
        arguments = (params, known, _given(state.slots))
        result = self.reader.call(arguments, replacements(read, self.slots), self.steps)
        new, slots = self._read(result)
        if [t.shape for t in new] != [t.shape for t in params]:
            raise NestorError(
                f"The update {self.where} returned parameters of the shapes {[tuple(t.shape) for t in new]}, expected "
                f"{[tuple(t.shape) for t in params]}. Return (params, state), params in the same order.",
                level=self.level,
            )
        return State(new, slots)

    def step(self, state: State, grads: Sequence[Tensor | None], inputs: Inputs) -> State:
        with torch.no_grad():
            # Copies: the function may change its arguments in place, or return one of them.
            before = state.replace([t.detach().clone() for t in state.tensors()])
            after = self.differentiable_step(before, [None if g is None else g.detach() for g in grads], inputs)
            return after.replace([t.clone() for t in after.tensors()])

    def first_slots(self, count: int) -> list[Mapping[str, Any]]:
        return []

    def _read(self, result: Any) -> tuple[list[Tensor], list[Mapping[str, Any]]]:
        try:
            params, state = result
            slots = [] if state is None else [state] if isinstance(state, Mapping) else list(state)
            return list(params), slots
        except (TypeError, ValueError):
            raise NestorError(
                f"The update {self.where} returned {type(result).__name__}; return (params, state): a list of tensors, "
                "and None, a mapping or a list of mappings.",
                level=self.level,
            ) from None


def _given(slots: Sequence[Mapping[str, Any]]) -> Any:
    """Return the state in the form in which the function returned it."""
    if not slots:
        return None
    return slots[0] if len(slots) == 1 else list(slots)
