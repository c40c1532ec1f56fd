"""Guarded updates: a step with numbers that are not finite raises an error, and changes nothing if it can."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.distributed import Runtime
from nestor.errors import NonFiniteError
from nestor.levels.level import Gradient, Level, diagnose, is_finite, reads_finite
from nestor.optim.state import State
from nestor.training.last_step import LastStep
from nestor.training.level_state import LevelState
from nestor.training.results import Watched, broken, listed, recovery, result_error
from nestor.vectors import algebra

MOST_PENDING = 1_000
"""The number of unread flags after which a run reads them though nobody asks for its metrics."""


@dataclass
class FiniteGuard:
    """Raises an error for an optimizer step whose loss, gradient or result is not finite.

    A step whose loss or gradient is not finite is not taken. The result is known after the step only. On the CPU it is
    checked at once: the variables are then lost, unless ``keeps_last`` is set. On an accelerator, reading the flag
    would synchronize: a mask on the device selects the old or the new values, and the next :meth:`check` raises the
    error.

    Attributes:
        keeps_last: Whether a copy is made before each step on the CPU, and restored if the result is not finite.
        newest: Finds the newest checkpoint of the run, for errors.
        watched: What must be finite after each step, by level name; see :meth:`watch`.
        pending: The steps that :meth:`check` has not checked yet: a flag, and a function that makes the error.
    """

    keeps_last: bool = False
    newest: Callable[[], Path | None] = lambda: None
    watched: dict[str, Watched] = field(default_factory=dict)
    pending: list[tuple[Tensor, Callable[[], NonFiniteError]]] = field(default_factory=list)

    def watch(self, level: Level) -> None:
        """Note, before the first step of a level, which of its tensors are finite."""
        self.watched[level.name] = Watched.of(level)

    def examine(self, optimizer: Optimizer, level: Level, gradient: Gradient, before: LastStep | None) -> None:
        """Check the result of an optimizer's step entry by entry; restore what was ``before`` it, if known.

        Raises:
            NonFiniteError: If the result is not finite.
        """
        slots = level.stepping.optimizer_slots(level.parameters)
        names = broken(level, self.watched[level.name].tensors(level.parameters, slots))
        if not names:
            return
        if before is not None:
            before.restore(optimizer, level.parameters)
        raise result_error(level, gradient, names, newest=None if before is not None else self.newest)

    def step(self, optimizer: Optimizer, level: Level, gradient: Gradient, step: int) -> None:
        """Step the optimizer on an accelerator; ``.grad`` of the parameters must be set."""
        finite = is_finite(gradient)

        def result() -> Tensor:
            slots = level.stepping.optimizer_slots(level.parameters)
            tensors = self.watched[level.name].tensors(level.parameters, slots)
            return level.space.are_finite(list(tensors.values())).all() if tensors else torch.ones_like(finite)

        holds = step_where(finite, optimizer, level.parameters, result)
        self.defer(self._counted(level, finite, holds), level, gradient, step)

    def skip(self, level: Level, finite: Tensor) -> None:
        """Count a step whose gradient overflowed in half precision on the CPU.

        Raises:
            NonFiniteError: If too many steps in a row have overflowed at the smallest scale.
        """
        scaling = level.loss.scaling
        assert scaling is not None
        scaling.update(finite)
        if not bool(scaling.goes_on()):
            raise stuck_error(level)

    def defer(self, holds: Tensor, level: Level, gradient: Gradient, step: int) -> None:
        """Store the flag of a step that was selected on the device; :meth:`check` reads the flag."""
        self._defer(holds, partial(_error_of, level, gradient.scalars(level.space), step))

    def _defer(self, holds: Tensor, error: Callable[[], NonFiniteError]) -> None:
        self.pending.append((holds, error))

    def accept(self, new: State, old: State, level: Level, gradient: Gradient, step: int) -> State:
        """Return the ``new`` state if it and the gradient are finite; otherwise, on an accelerator, the ``old`` state.

        Raises:
            NonFiniteError: On the CPU, if a number is not finite.
        """
        tensors = self.watched[level.name].tensors(new.params, new.slots)
        if gradient.loss.device.type == "cpu":
            if not reads_finite(gradient):
                raise diagnose(level, gradient).located(step=step)
            if level.space.holds_finite(new.params) and float(gradient.norm) < self.watched[level.name].largest:
                return new
            if names := broken(level, tensors):
                raise result_error(level, gradient, names, newest=None).located(step=step)
            return new
        finite = holds = is_finite(gradient)
        if tensors:
            holds = holds & level.space.are_finite(list(tensors.values())).all()
        self.defer(self._counted(level, finite, holds), level, gradient, step)
        if len(new.tensors()) != len(old.tensors()):  # the rule's first step creates its memory: no old memory exists
            old = State(old.params, new.slots)
        return new.replace([torch.where(holds, n, o) for n, o in zip(new.tensors(), old.tensors(), strict=True)])

    def _counted(self, level: Level, finite: Tensor, holds: Tensor) -> Tensor:
        """Count the gradient of a level in half precision; return whether the step needs no error.

        Half precision overflows occasionally: such a step is skipped, without an error.
        """
        scaling = level.loss.scaling
        if scaling is None:
            return holds
        scaling.update(finite)
        self._defer(scaling.goes_on(), partial(stuck_error, level))
        return holds | ~finite

    def check(self) -> None:
        """Read the flags of the steps since the last check; this waits for the device.

        Raises:
            NonFiniteError: For the first step that was undone.
        """
        pending, self.pending = self.pending, []
        if pending:
            flags = torch.stack([holds.to(pending[0][0].device) for holds, _ in pending]).tolist()
            for flag, (_, error) in zip(flags, pending, strict=True):
                if not flag:
                    raise error()

    def check_state(self, states: Mapping[str, LevelState], runtime: Runtime) -> None:
        """Check all variables, optimizer memory and buffers before they are saved. All processes must call this method.

        Raises:
            NonFiniteError: If a number is not finite that was finite before the first step.
        """
        for name, watched in self.watched.items():
            level = states[name].level
            tensors = watched.tensors(level.parameters, states[name].memory.read())
            names = [key for key, tensor in tensors.items() if not algebra.holds_finite([tensor])]
            names += [f"buffer {buffer}" for buffer in watched.broken_buffers()]
            if runtime.any(bool(names)):
                raise NonFiniteError(
                    f"The state is not finite and is not saved: {listed(names) or 'numbers of another process'}. The "
                    "result of every step was finite, so a callback or the forward pass of a module has changed it. "
                    f"{recovery(self.newest())}",
                    level=name,
                )


def stuck_error(level: Level) -> NonFiniteError:
    """Return the error of a level whose steps overflow at every loss scale."""
    assert level.loss.scaling is not None
    return NonFiniteError(
        f"{level.loss.scaling.patience} steps in a row have overflowed in half precision at the smallest loss scale, "
        "1, and were skipped: smaller scales do not help. The loss is NaN or infinite, or a derivative is larger than "
        '65504, the largest fp16 number. Use precision="bf16" or "fp32", Problem(..., precision="fp32") for this level '
        "alone, or look for NaN in the data. Parameters are as before these steps.",
        level=level.name,
        where=level.loss.where,
    )


def _error_of(level: Level, gradient: Gradient, step: int) -> NonFiniteError:
    """Return the error of a step that was undone."""
    error = result_error(level, gradient, (), newest=None) if reads_finite(gradient) else diagnose(level, gradient)
    return error.located(step=step)


def step_where(
    condition: Tensor, optimizer: Optimizer, parameters: Iterable[Tensor], result: Callable[[], Tensor] | None = None
) -> Tensor:
    """Step the optimizer if ``condition`` is true, and ``result()`` is true after the step, without reading either.

    If one is false, parameters and tensors of the optimizer's state keep their values. A state tensor that the step has
    created becomes zero, the initial value in torch's optimizers.

    Returns:
        Whether the step was taken, as a tensor.
    """
    parameters = list(parameters)
    # The optimizer always steps; a mask on the device then selects the new or the old values.
    before = [p.detach().clone() for p in parameters]
    state = {
        p: {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in parameters if p in optimizer.state
    }
    optimizer.step()
    if result is not None:
        condition = condition & result()
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(torch.where(condition, parameter, old))
        for parameter in parameters:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    past = state.get(parameter, {}).get(key)
                    past = past if isinstance(past, Tensor) else torch.zeros_like(value)
                    value.copy_(torch.where(condition.to(value.device), value, past))
    return condition
