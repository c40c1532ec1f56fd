"""The memory that the updates of a program will take, without taking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from nestor.autodiff.instruments import trace
from nestor.autodiff.torch_private import DataDependentError, fake_tensor_mode, tree_map
from nestor.data.draws import Captured, Draw
from nestor.errors import NestorError
from nestor.explain.peak_memory import PeakMemory
from nestor.explain.taken import taken_steps
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.planning import planned_history
from nestor.optim.history import LevelHistory
from nestor.optim.update import State
from nestor.vectors.algebra import Params


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors.

    Attributes:
        held: What stays from step to step: parameters and buffers of the modules, what optimizers keep, the states
            that responses keep of a run.
        update: What an update creates on its way, at its peak, by level.
    """

    held: int
    update: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most at any time of an engine step."""
        return self.held + max(self.update.values())


def forecast(evaluator: Evaluator, batches: Mapping[str, Any]) -> Memory:
    """Run the updates on tensors that have shapes but no values, and count what they would allocate.

    Kernels of some operations take scratch memory beside their tensors. The forecast does not contain it.

    Raises:
        ValueError: If a batch is missing.
        NestorError: If a loss or a response reads values.
    """
    missing = [name for name, level in evaluator.levels.items() if level.loss.takes_batch and name not in batches]
    if missing:
        raise ValueError(f"explain(batches=...) needs a batch of level {', '.join(map(repr, missing))} too.")
    randomness = Captured.now()
    with fake_tensor_mode() as fake, trace(placeholder=1.0), randomness.replay():

        def placeholder(value: Any) -> Any:
            return fake.from_tensor(value) if isinstance(value, Tensor) else value

        variables = {
            name: tuple(fake.from_tensor(p.detach()).requires_grad_() for p in level.parameters)
            for name, level in evaluator.levels.items()
        }
        shapes = evaluator.with_variables(variables)
        given = {name: tree_map(placeholder, batch) for name, batch in batches.items()}
        held = _held(evaluator)
        histories: dict[str, LevelHistory] = {}
        update: dict[str, int] = {}
        try:
            for name, level in shapes.levels.items():
                draws = (Draw(given.get(name), randomness),) * level.problem.accumulate
                slots = _slots(shapes, level)
                planned = planned_history(level, draws, dict(histories))
                histories[name], kept = _taken(planned, level, slots, owned=name in shapes.single_reader_levels)
                with PeakMemory() as memory, torch.enable_grad():
                    below = {
                        other: _with_gradient(histories[other], shapes.levels[other])
                        for other in shapes.below(name)[:-1]
                    }
                    own = {name: LevelHistory(draws)}
                    shapes.gradient(level, {**below, **own}, statistics=False, exclusive=True)
                    del below
                update[name] = max(memory.peak, _step(level))
                held += kept + sum(_bytes(v) for slot in slots for v in slot.values() if isinstance(v, Tensor))
        except DataDependentError as error:
            raise NestorError(
                f"The memory cannot be foreseen: {getattr(error, 'func', 'an operation')} reads a value, in a loss or "
                "in a solver that decides by its residual when to stop. check_hypergradient(...) measures it.",
            ) from None
    return Memory(held, update)


def _held(evaluator: Evaluator) -> int:
    """Count the parameters and buffers of the modules, and the copies of them that are variables."""
    tensors = {
        id(t): t
        for level in evaluator.levels.values()
        for t in (*level.problem.module.parameters(), *level.problem.module.buffers(), *level.parameters)
    }
    return sum(map(_bytes, tensors.values()))


def _taken(
    planned: LevelHistory, level: Level, slots: Sequence[Mapping[str, Any]], *, owned: bool
) -> tuple[LevelHistory, int]:
    """Turn planned steps into the history that an engine would have built; count the bytes that it keeps.

    An ``owned`` history belongs to one response, which frees the gradient that replaces the state.
    """
    spec = level.response.history_spec
    params = planned.states[0]().params if planned.steps else ()
    builder = taken_steps(planned, level, lambda: State(params, slots if spec and spec.slots else [{} for _ in slots]))
    if builder is None or spec is None:
        return planned, 0
    uppers = {name: [torch.zeros_like(p) for p in _read(level, name)] for name in level.uppers}
    is_freed = owned and not builder.keeps_states
    gradient = [] if is_freed else [torch.ones_like(p) for p in level.parameters]
    builder.took(gradient, uppers if spec.input_gradients and not level.lowers else {})
    history = builder.build(planned.draws, slots=lambda: slots)
    states = [stored().tensors() for stored in history.states.values()] if spec.offload_to is None else []
    kept = [t for tensors in (*states, *history.gradients) for t in tensors if t is not None]
    return history, sum(map(_bytes, kept))


def _read(level: Level, name: str) -> Params:
    return level.loss.variables[name] if name in level.loss.slots else ()


def _with_gradient(history: LevelHistory, level: Level) -> LevelHistory:
    """Add the gradient of the last step, if the response frees it."""
    if history.slots_after is None or any(history.gradients):
        return history
    return history._replace(gradients=[[torch.ones_like(p) for p in level.parameters]])


def _step(level: Level) -> int:
    """Count what the optimizer's own step creates, while the gradient is there.

    The optimizers of torch create two tensors a variable, except SGD: on the CPU for one variable after the other, else
    for all at once.
    """
    sizes = [_bytes(p) for p in level.parameters]
    optimizer = level.problem.optimizer
    if optimizer is None or isinstance(optimizer, SGD):
        return sum(sizes)
    in_turn = level.parameters[0].device.type == "cpu"
    return sum(sizes) + 2 * (max(sizes) if in_turn else sum(sizes))


def _slots(evaluator: Evaluator, level: Level) -> Sequence[Mapping[str, Any]]:
    """Return the memory of the level's update rule after a step."""
    optimizer = level.problem.optimizer
    if optimizer is None:
        return []
    known = [optimizer.state.get(p, {}) for p in level.stepping.parameters]
    if level.problem.tasks is None and any(known):
        return known
    zeros = [torch.zeros_like(p) for p in level.parameters]
    before = State([p.detach() for p in level.parameters], [{} for _ in level.parameters])
    inputs = {name: evaluator.levels[name].parameters for name in level.links.dependencies}
    with torch.no_grad():
        return level.stepping.rule().differentiable_step(before, zeros, inputs).slots


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
