"""Guarded updates: a step with numbers that are not finite changes nothing."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.errors import NonFiniteError
from nestor.levels.level import Gradient, Level, diagnose, is_finite, reads_finite
from nestor.optim.update import State


@dataclass
class FiniteGuard:
    """Applies an optimizer step only if loss and gradient are finite.

    On the CPU, a step that is not finite raises an error at once. On an accelerator, reading the flag would
    synchronize: a mask on the device selects the old or the new values, and the next :meth:`check` raises the error.

    Attributes:
        pending: The steps that :meth:`check` has not checked yet: flag, level, scalars of the gradient, engine step.
    """

    pending: list[tuple[Tensor, Level, Gradient, int]] = field(default_factory=list)

    def step(self, optimizer: Optimizer, level: Level, gradient: Gradient, step: int) -> bool:
        """Step the optimizer on an accelerator, or under a loss scale; ``.grad`` of the parameters must be set.

        Returns:
            False if the step was skipped on the CPU. On an accelerator True, because the flag is not read.
        """
        scaling = level.loss.scaling
        finite = is_finite(gradient)
        if scaling is not None:
            # Half precision overflows occasionally: skip and count the step, without an error.
            if finite.device.type != "cpu":
                step_where(finite, optimizer, level.parameters)
            elif bool(finite):
                optimizer.step()
            scaling.update(finite)
            return bool(finite) if finite.device.type == "cpu" else True
        step_where(finite, optimizer, level.parameters)
        self.defer(finite, level, gradient, step)
        return True

    def defer(self, finite: Tensor, level: Level, gradient: Gradient, step: int) -> None:
        """Store the flag of a step that was selected on the device; :meth:`check` reads the flag."""
        self.pending.append((finite, level, gradient.scalars(level.space), step))

    def accept(self, new: State, old: State, level: Level, gradient: Gradient, step: int) -> State:
        """Return the ``new`` state if it and the gradient are finite; otherwise, on an accelerator, the ``old`` state.

        Raises:
            NonFiniteError: On the CPU, if a number is not finite.
        """
        finite = is_finite(gradient) & torch.isfinite(level.space.norm(new.params))
        if finite.device.type == "cpu":
            if not bool(finite):
                if reads_finite(gradient):
                    raise NonFiniteError(
                        "The update rule returned parameters that are not finite, for a finite gradient. They are as "
                        "before the step.",
                        level=level.name,
                        step=step,
                    )
                raise diagnose(level, gradient).located(step=step)
            return new
        self.defer(finite, level, gradient, step)
        if len(new.tensors()) != len(old.tensors()):  # the rule's first step creates its memory: no old memory exists
            old = State(old.params, new.slots)
        return new.replace([torch.where(finite, n, o) for n, o in zip(new.tensors(), old.tensors(), strict=True)])

    def check(self) -> None:
        """Read the flags of the steps since the last check; this waits for the device.

        Raises:
            NonFiniteError: For the first step that was undone.
        """
        pending, self.pending = self.pending, []
        if pending:
            flags = torch.stack([finite.to(pending[0][0].device) for finite, *_ in pending]).tolist()
            for flag, (_, level, gradient, step) in zip(flags, pending, strict=True):
                if not flag:
                    raise diagnose(level, gradient).located(step=step)


def step_where(condition: Tensor, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Step the optimizer if ``condition`` is true, without reading the condition.

    If it is false, parameters and tensors of the optimizer's state keep their values. A state tensor that the step has
    created becomes zero, the initial value in torch's optimizers.
    """
    parameters = list(parameters)
    # The optimizer always steps; a mask on the device then selects the new or the old values.
    before = [p.detach().clone() for p in parameters]
    state = {
        p: {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in parameters if p in optimizer.state
    }
    optimizer.step()
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(torch.where(condition, parameter, old))
        for parameter in parameters:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    past = state.get(parameter, {}).get(key)
                    past = past if isinstance(past, Tensor) else torch.zeros_like(value)
                    value.copy_(torch.where(condition.to(value.device), value, past))
