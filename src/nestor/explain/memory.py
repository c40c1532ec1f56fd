"""The memory that the updates of a program will take, without taking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD

from nestor.autodiff.randomness import Captured
from nestor.autodiff.torch_private import DataDependentError, fake_tensor_mode, tree_map
from nestor.autodiff.tracing import trace
from nestor.errors import NestorError
from nestor.explain.peak_memory import PeakMemory
from nestor.levels.level import Draw, Level
from nestor.levels.moment import Moment, ahead
from nestor.optim.state import State, keep
from nestor.optim.update import OptimizerUpdate

if TYPE_CHECKING:
    from nestor.program import Program


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


def forecast(program: Program, batches: Mapping[str, Any]) -> Memory:
    """Run the updates on tensors that have shapes but no numbers, and count what they would allocate.

    Kernels of some operations take scratch memory beside their tensors, which is not seen.

    Raises:
        ValueError: If a batch is missing.
        NestorError: If a loss or a response looks at numbers.
        NotImplementedError: If this version of torch has no tensors without values.
    """
    missing = [name for name, level in program.levels.items() if level.takes_batch and name not in batches]
    if missing:
        raise ValueError(f"explain(batches=...) needs a batch of level {', '.join(map(repr, missing))} too.")
    randomness = Captured.now()
    with fake_tensor_mode() as fake, trace(placeholder=1.0), randomness.replay():
        shapes = _stand_ins(program, fake)
        given = {name: _without_values(batch, fake) for name, batch in batches.items()}
        held = _held(program)
        moments: dict[str, Moment] = {}
        update: dict[str, int] = {}
        once = program.read_once()
        try:
            for name, level in shapes.levels.items():
                draws = (Draw(given.get(name), randomness),) * level.problem.accumulate
                slots = _slots(shapes, level)
                moments[name], states = _taken(ahead(level, draws, dict(moments)), level, slots, name in once)
                with PeakMemory() as memory, torch.enable_grad():
                    below = {other: _given(moments[other], shapes.levels[other]) for other in shapes.below(name)[:-1]}
                    shapes.gradient(level, {**below, name: Moment(draws)}, statistics=False)
                    del below
                update[name] = max(memory.peak, _step(level))
                held += states + sum(_bytes(v) for slot in slots for v in slot.values() if isinstance(v, Tensor))
        except DataDependentError as error:
            raise NestorError(
                f"The memory cannot be foreseen: {error.func} looks at a number, in a loss or in a solver that decides "
                "by its residual when to stop. check_hypergradient(...) measures it.",
            ) from None
    return Memory(held, update)


def _without_values(batch: Any, fake: Any) -> Any:
    return tree_map(lambda leaf: fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def _stand_ins(program: Program, fake: Any) -> Program:
    tensors = {name: [fake.from_tensor(p.detach()) for p in level.parameters] for name, level in program.levels.items()}
    return standing_in(program, tensors)


def standing_in(program: Program, tensors: Mapping[str, Sequence[Tensor]]) -> Program:
    """Return the program with other tensors in the place of its variables."""
    leaves = {name: tuple(t.detach().requires_grad_() for t in values) for name, values in tensors.items()}
    own = cast(Mapping[str, "tuple[nn.Parameter, ...]"], leaves)
    levels: dict[str, Level] = {
        name: replace(level, parameters=own[name], constants={n: own[n] for n in level.constants}, bound=False)
        for name, level in program.levels.items()
    }
    return program.with_levels(levels)


def _held(program: Program) -> int:
    """Count the parameters and buffers of the modules, and the copies of them that are variables."""
    tensors = {
        id(t): t
        for level in program.levels.values()
        for t in (*level.problem.module.parameters(), *level.problem.module.buffers(), *level.parameters)
    }
    return sum(map(_bytes, tensors.values()))


def _taken(moment: Moment, level: Level, slots: Sequence[Mapping[str, Any]], once: bool) -> tuple[Moment, int]:
    """Turn the steps that lie ahead into steps that were taken; count the states that are kept of them."""
    recording = level.response.recording
    if not moment.records or recording is None:
        return moment._replace(once=once), 0
    count = min(len(moment.records), recording.window or len(moment.records))
    state = keep(State(moment.states[0]().params, slots if recording.slots else [{} for _ in slots]))
    states = dict.fromkeys(range(0, count, recording.spacing or count), state)
    rule = moment.records[0].update
    if recording.after and isinstance(rule, OptimizerUpdate) and rule.has_slope:
        taken = moment._replace(records=moment.records[:1], states={}, ahead=False, after=slots, once=once)
        return (taken, 0) if once else (_given(taken, level), sum(map(_bytes, level.parameters)))
    gradients = [[torch.ones_like(p) for p in level.parameters]] if recording.gradient else []
    inputs = {}
    if recording.inputs and not level.lowers:
        inputs = {name: [torch.zeros_like(p) for p in level.constants.get(name, ())] for name in level.uppers}
    size = sum(map(_bytes, state().tensors())) if recording.place is None else 0
    taken = moment._replace(
        records=moment.records[:count],
        states=states,
        ahead=False,
        gradients=gradients,
        input_gradients=inputs,
        once=once,
    )
    return taken, size * len(states) + sum(_bytes(g) for kept in gradients for g in kept)


def _step(level: Level) -> int:
    """Count what the optimizer's own step creates, while the gradient is there.

    torch's work with two tensors beside it, but for SGD: on the CPU one variable after the other, else all at once.
    """
    sizes = [_bytes(p) for p in level.parameters]
    optimizer = level.problem.optimizer
    if optimizer is None or isinstance(optimizer, SGD):
        return sum(sizes)
    in_turn = level.parameters[0].device.type == "cpu"
    return sum(sizes) + 2 * (max(sizes) if in_turn else sum(sizes))


def _given(moment: Moment, level: Level) -> Moment:
    """Add the gradient of the last step, which the response uses up where the moment is for it alone."""
    needed = moment.after is not None and not moment.gradients
    return moment._replace(gradients=[[torch.ones_like(p) for p in level.parameters]]) if needed else moment


def _slots(program: Program, level: Level) -> Sequence[Mapping[str, Any]]:
    """Return what the level's update rule keeps after a step."""
    problem = level.problem
    if problem.optimizer is None:
        return []
    known = [problem.optimizer.state.get(p, {}) for p in level.members]
    if problem.tasks is None and any(known):
        return known
    zeros = [torch.zeros_like(p) for p in level.parameters]
    before = State([p.detach() for p in level.parameters], [{} for _ in level.parameters])
    inputs = {name: program.levels[name].parameters for name in level.depends}
    with torch.no_grad():
        return level.rule().linked(before, zeros, inputs).slots


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
