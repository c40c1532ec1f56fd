"""A level of a validated program: its variables, what its loss reads, and how the loss is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestor.autodiff.counters import count_forward
from nestor.autodiff.precision import Precision
from nestor.autodiff.randomness import Randomness
from nestor.autodiff.vmap import looped, vectorized
from nestor.errors import LossError
from nestor.levels.function_update import FunctionUpdate
from nestor.levels.placement import Placement
from nestor.levels.reader import Reader, replacements
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, Update
from nestor.problem import Problem
from nestor.responses import Response
from nestor.responses.unrolling.trajectory import StepGraphs
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


class Draw(NamedTuple):
    """One batch, and the random numbers that its evaluations see."""

    batch: Any
    randomness: Randomness


class Value(NamedTuple):
    """What a loss returned: the scalar to minimise and the metrics beside it."""

    loss: Tensor
    metrics: Mapping[str, Any]


# Mapped over tasks, these are slower on a CPU than one task after the other (1.15 x).
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a program.

    Attributes:
        name: Its name.
        index: Its place, lowest first.
        problem: The declaration.
        where: The loss, as ``name (file:line)``.
        takes_batch: Whether the loss's first argument is a batch.
        reads: The levels whose variables the loss reads, in the program's order.
        depends: The levels that its step depends on: those its loss reads, those its update rule reads, its init.
        update: The user's update rule, if it has one.
        learned: Hyperparameters of its optimizer that are variables of levels above.
        lowers: The levels below whose best responses its objective contains, in the program's order.
        uppers: The levels above on which its objective depends, in the program's order.
        parameters: Its variables: those of the module, or stacks of copies of them, one a task.
        members: The parameters of the module that they stand for.
        mapped: The levels with tasks among those that the loss reads, and the number of tasks.
        names: Their names in ``module.named_parameters()``.
        response: How the levels above differentiate through it.
        reader: Evaluates the loss with other tensors in the place of parameters.
        start: For each variable, its place among those of the level that it starts from (``Problem(init=...)``).
        placements: Where the variables of every level live; None if one process holds them all.
        precision: Of its loss; None is that of its tensors.
        slots: For every level read, the names of its variables within the reader.
        bound: Whether the variables of all levels read stand in the modules; else losses are evaluated with theirs in
            the place of the modules' own.
        graphs: Replays its steps by compiled graphs.
    """

    name: str
    index: int
    problem: Problem
    where: str
    takes_batch: bool
    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    depends: tuple[str, ...]
    update: FunctionUpdate | None
    learned: Mapping[tuple[int, str], tuple[str, int]]
    lowers: tuple[str, ...]
    uppers: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    members: tuple[nn.Parameter, ...]
    mapped: Mapping[str, int]
    names: tuple[str, ...]
    start: Sequence[int]
    response: Response
    placements: Mapping[str, Placement] | None
    precision: Precision | None
    reader: Reader
    slots: Mapping[str, Sequence[tuple[str, ...]]]
    constants: Mapping[str, tuple[nn.Parameter, ...]]
    all_buffers: Sequence[tuple[str, nn.Module, str]]
    lower_buffers: Sequence[tuple[str, nn.Module, str]]
    bound: bool = True
    graphs: StepGraphs | None = None

    def whole(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return whole vectors for vectors like the variables that this process holds."""
        return list(values) if self.placements is None else self.placements[self.name].whole(values)

    def part(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return what this process holds of whole vectors."""
        return list(values) if self.placements is None else self.placements[self.name].part(values)

    def rule(self) -> Update:
        """The rule of the level's next step, with the hyperparameters as they stand.

        Raises:
            LossError: If the level has no optimizer and no update.
        """
        if self.update is not None:
            return self.update
        if self.problem.optimizer is None:
            raise LossError(
                f"The response {self.response.describe()} needs to know how the level steps: give it an optimizer, "
                "Problem(..., optimizer=...).",
                level=self.name,
                where=self.where,
            )
        return self._rule.now(self.problem.optimizer)

    @cached_property
    def _rule(self) -> OptimizerUpdate:
        assert self.problem.optimizer is not None
        tasks = self.problem.tasks is not None
        return OptimizerUpdate.of(
            self.problem.optimizer, self.members, self.problem.clip_norm, self.learned, tasks=tasks
        )

    def state(self, rule: Update) -> State:
        """Copy the state that the level's first step would start from."""
        if isinstance(rule, OptimizerUpdate) and self.problem.init is None and self.problem.tasks is None:
            return rule.state(self.parameters)
        # Tasks, and a level that starts from another one, start with an optimizer that has no memory.
        slots: list[dict[str, Any]] = [{} for _ in self.parameters] if isinstance(rule, OptimizerUpdate) else []
        return State([p.detach().clone() for p in self.parameters], slots)

    def own_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers that the level's own step may move with copies of their values."""
        if not self.all_buffers:
            return []
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for _, module, attribute in self.all_buffers:
            buffer = getattr(module, attribute)
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = (buffer, buffer.clone())
        return list(copies.values())

    def step_value(self, draw: Draw, replaced: Mapping[str, Params]) -> Value:
        """Evaluate the loss for the level's own step.

        The real parameters are in place but for those that are ``replaced``. The statistics of the modules move
        (BatchNorm's), those of the levels below do not.
        """
        if self.mapped:
            stacks = {name: self.constants[name] for name in self.mapped}
            tensors = replacements({**stacks, **replaced}, self.slots)
            return self._mapped(draw, tensors, _copies(self.all_buffers))
        if self.placements is not None:
            replaced = self._whole({**self.constants, self.name: self.parameters, **replaced})
        tensors = replacements(replaced, self.slots) if replaced else {}
        if self.lower_buffers:
            tensors.update(_copies(self.lower_buffers))
        return self._evaluate(draw, tensors)

    def buffer_values(self) -> list[Tensor | None]:
        """Copy the values of the buffers that the loss reads, in the order of ``all_buffers``."""
        copies = _copies(self.all_buffers)
        return [copies.get(name) for name, _, _ in self.all_buffers]

    def pure_value(
        self, draw: Draw, replaced: Mapping[str, Params], buffers: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Evaluate the loss as a function of the ``replaced`` variables; every other tensor is a constant.

        Leaves no trace: buffers are copies, random numbers those of the draw.

        Args:
            draw: The batch.
            replaced: Tensors to use for the variables of some levels.
            buffers: Values of the buffers, as :meth:`buffer_values` returned them; None takes the present ones.
        """
        known = dict(replaced)
        for level, parameters in self.constants.items():
            if level not in known:
                known[level] = [p.detach() for p in parameters]
        tensors = replacements(known if self.placements is None else self._whole(known), self.slots)
        held = _copies(self.all_buffers, buffers) if self.all_buffers else {}
        if self.mapped:
            return self._mapped(draw, tensors, held).loss
        tensors.update(held)
        return self._evaluate(draw, tensors).loss

    def _whole(self, held: Mapping[str, Params]) -> Mapping[str, Params]:
        """Turn what this process holds into what a loss reads, for the levels that it reads."""
        if self.placements is not None:
            held = {level: self.placements[level].use(values) for level, values in held.items() if level in self.slots}
        return held

    @cached_property
    def is_large(self) -> bool:
        """Whether the memory of one more vector like its variables is worth saving."""
        return algebra.is_large(self.parameters)

    @cached_property
    def loops(self) -> bool:
        """Whether tasks are evaluated one after the other."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return on_cpu and any(isinstance(module, CONVOLUTIONS) for module in self.reader.modules())

    @property
    def loss_scale(self) -> Tensor | None:
        """The factor by which gradients of the loss are scaled on their way; None is one."""
        scaling = self.precision.scaling if self.precision is not None else None
        return None if scaling is None else scaling.scale

    def _evaluate(self, draw: Draw, tensors: dict[str, Tensor]) -> Value:
        count_forward(self.name)
        batch = (draw.batch,) if self.takes_batch else ()
        # Every alias of a tied parameter is among the names.
        if self.precision is None:
            with draw.randomness.replay():
                return self._value(self.reader.call(batch, tensors))
        with draw.randomness.replay(), self.precision.evaluate(self.parameters[0].device):
            return self._value(self.reader.call(batch, tensors))

    def _mapped(self, draw: Draw, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> Value:
        """Evaluate the loss once a task, all tasks at once: their sum for a level with tasks, else their mean."""
        count_forward(self.name)
        count = next(iter(self.mapped.values()))
        own = {name for level in self.mapped for names in self.slots[level] for name in names}
        stacked = {name: tensor for name, tensor in tensors.items() if name in own}
        stacked.update({name: torch.stack([buffer] * count) for name, buffer in buffers.items()})
        shared = {name: tensor for name, tensor in tensors.items() if name not in own}

        def one(batch: Any, mine: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            result = self.reader.call(batch, {**shared, **mine})
            value = self._value(result)
            return value.loss, {k: v for k, v in value.metrics.items() if isinstance(v, Tensor)}

        batch = (draw.batch,) if self.takes_batch else ()
        precise = nullcontext() if self.precision is None else self.precision.evaluate(self.parameters[0].device)
        with draw.randomness.replay(), precise:
            try:
                losses, metrics = (looped if self.loops else vectorized)(one, batch, stacked, count)
            except ValueError as error:
                raise LossError(
                    f"The loss could not be mapped over {count} tasks ({str(error).splitlines()[0]}). Every tensor of "
                    "the batch needs a leading dimension of that size, and a batch may hold nothing but tensors in "
                    "tuples, lists and dicts.",
                    level=self.name,
                    where=self.where,
                ) from None
        loss = losses.sum() if self.problem.tasks is not None else losses.mean()
        return Value(loss, {key: value.detach().float().mean() for key, value in metrics.items()})

    def _value(self, result: Any) -> Value:
        if isinstance(result, Tensor) and not result.dim() and result.dtype not in _HALF:
            return Value(result, _NO_METRICS)
        metrics: Mapping[str, Any] = _NO_METRICS
        loss = result
        if isinstance(result, Mapping):
            if "loss" not in result:
                raise LossError(
                    f"The loss returned a mapping with the keys {sorted(map(str, result))} and no 'loss'. Put the "
                    "scalar to minimise under 'loss'; the other scalars are metrics.",
                    level=self.name,
                    where=self.where,
                )
            loss = result["loss"]
            metrics = {key: _detached(value) for key, value in result.items() if key != "loss" and _is_scalar(value)}
        if not isinstance(loss, Tensor):
            raise LossError(
                f"The loss returned {type(loss).__name__}, not a Tensor. Return the scalar itself (no .item()), or a "
                "mapping with 'loss'.",
                level=self.name,
                where=self.where,
            )
        if loss.numel() != 1:
            raise LossError(
                f"The loss returned a tensor of shape {tuple(loss.shape)}, not a scalar. Reduce it, for example with "
                ".mean().",
                level=self.name,
                where=self.where,
            )
        if loss.dim():
            loss = loss.reshape(())
        return Value(loss.float() if loss.dtype in _HALF else loss, metrics)


_NO_METRICS: Mapping[str, Any] = MappingProxyType({})
_HALF = (torch.float16, torch.bfloat16)


def _copies(
    slots: Sequence[tuple[str, nn.Module, str]], values: Sequence[Tensor | None] | None = None
) -> dict[str, Tensor]:
    """Copy buffers, or the ``values`` in their place; a buffer that several modules hold is copied once."""
    copies: dict[int, Tensor] = {}
    tensors = {}
    for index, (name, module, attribute) in enumerate(slots):
        buffer = getattr(module, attribute)
        if buffer is not None:
            value = buffer if values is None else values[index]
            if value is not None:
                tensors[name] = copies.setdefault(id(buffer), value.clone())
    return tensors


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
