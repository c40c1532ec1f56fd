"""The loss of a level, evaluated at the modules' own tensors or at other tensors."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nestor.autodiff.instruments import count_forward
from nestor.autodiff.precision import LossScale, Precision
from nestor.autodiff.scope import Slot, original
from nestor.autodiff.vmap import looped, vectorized
from nestor.data.draws import Draw
from nestor.errors import LossError
from nestor.levels.constants import Constants
from nestor.levels.placement import Placement
from nestor.levels.reader import Reader, replacements
from nestor.optim.history import Buffers
from nestor.vectors import Params

Value: TypeAlias = tuple[Tensor, Mapping[str, Any]]
"""The result of a loss: the scalar to minimise, and the metrics."""


@dataclass(frozen=True, eq=False)
class LevelLoss:
    """The loss of one level.

    Attributes:
        level: Name of the level.
        where: The loss, as ``name (file:line)``.
        takes_batch: Whether the loss's first argument is a batch.
        reader: Calls the loss with other tensors in the modules.
        variables: The variables of every level of the program, by level name.
        slots: For each level that the loss reads, the names of its variables within the reader.
        buffers: The buffers of all modules that the loss reads, by name in the reader.
        lower_buffers: The buffers among them that belong to modules of levels below.
        task_counts: The levels with tasks among those that the loss reads, and the number of tasks.
        in_modules: Whether the modules contain ``variables``; otherwise every evaluation puts them into the modules.
        precision: The precision of the operations; None means that of the tensors.
        placements: How the variables of each level are split among processes; None if all are on this process.
    """

    level: str
    where: str
    takes_batch: bool
    reader: Reader
    variables: Mapping[str, Params]
    slots: Mapping[str, Sequence[tuple[str, ...]]]
    buffers: Sequence[tuple[str, Slot]]
    lower_buffers: Sequence[tuple[str, Slot]]
    task_counts: Mapping[str, int]
    in_modules: bool = True
    precision: Precision | None = None
    placements: Mapping[str, Placement] | None = None

    @property
    def constants(self) -> Constants | None:
        """The tensors that the loss reads and that are variables or buffers of no level; None if there are none."""
        return self.reader.constants

    @property
    def scaling(self) -> LossScale | None:
        """The loss scale of fp16; None for other precisions."""
        return self.precision.scaling if self.precision is not None else None

    @property
    def scale(self) -> Tensor | None:
        """The factor that multiplies the loss before its reverse pass; None means 1."""
        return None if self.precision is None or self.precision.scaling is None else self.precision.scaling.scale

    def saved_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers and constants that the level's own step may change with copies of their values."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for _, slot in self.buffers:
            buffer = original(*slot)
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = (buffer, buffer.clone())
        return [*copies.values(), *(() if self.constants is None else self.constants.saved())]

    def buffer_values(self) -> list[Tensor | None]:
        """Copy the values of the buffers that the loss reads, in the order of ``buffers``, and of its constants."""
        copies = _copies(self.buffers)
        held = [copies.get(name) for name, _ in self.buffers]
        return held if self.constants is None else held + self.constants.values()

    def step_value(self, draw: Draw, replaced: Mapping[str, Params], noted: list[Buffers] | None = None) -> Value:
        """Evaluate the loss for the level's own step.

        The modules contain their own parameters, except the ``replaced`` ones. The loss updates buffers (BatchNorm's
        statistics) of the level's modules, but not those of the levels below, and constants (a teacher). The values
        of all these before the evaluation are appended to ``noted``.
        """
        if noted is not None:
            noted.append(self.buffer_values())
        constants = self.constants
        if constants is None:
            return self._step_value(draw, replaced)
        constants.look()
        value = self._step_value(draw, replaced)
        constants.look()
        return value

    def _step_value(self, draw: Draw, replaced: Mapping[str, Params]) -> Value:
        if not self.in_modules or self.placements is not None:
            replaced = {**{level: self.variables[level] for level in self.slots}, **replaced}
        if self.task_counts:
            stacks = {name: self.variables[name] for name in self.task_counts}
            return self._mapped(draw, replacements({**stacks, **replaced}, self.slots), _copies(self.buffers))
        if self.placements is not None:
            replaced = self._whole(replaced)
        tensors = replacements(replaced, self.slots) if replaced else {}
        if self.lower_buffers:
            tensors.update(_copies(self.lower_buffers))
        return self._evaluate(draw, tensors)

    def pure_value(
        self, draw: Draw, replaced: Mapping[str, Params] | None, buffers: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Evaluate the loss as a function of the ``replaced`` variables; every other tensor is a constant.

        The evaluation has no side effect: it uses copies of the buffers and of the constants that move, and replays the
        random numbers of the draw.

        Args:
            draw: The batch.
            replaced: Tensors to use for the variables of some levels, by level name; None evaluates the loss at the
                modules' own variables.
            buffers: Values of buffers and constants, as :meth:`buffer_values` returned them; None uses the current
                ones.
        """
        tensors: dict[str, Tensor] = {}
        if replaced is not None:
            known = {
                level: [p.detach() for p in self.variables[level]] for level in self.slots if level not in replaced
            }
            known |= replaced
            tensors = replacements(known if self.placements is None else self._whole(known), self.slots)
        copies = _copies(self.buffers, buffers) if self.buffers else {}
        constants = self.constants
        if constants is None:
            return self._pure_value(draw, tensors, copies)
        placed = constants.placed(buffers[len(self.buffers) :] if buffers else None)
        value = self._pure_value(draw, {**tensors, **placed}, copies)
        constants.check(placed)
        return value

    def _pure_value(self, draw: Draw, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> Tensor:
        if self.task_counts:
            return self._mapped(draw, tensors, copies)[0]
        tensors.update(copies)
        return self._evaluate(draw, tensors)[0]

    def _whole(self, held: Mapping[str, Params]) -> Mapping[str, Params]:
        """Gather this process's shards into the whole tensors that the loss reads."""
        assert self.placements is not None
        return {level: self.placements[level].to_loss(values) for level, values in held.items() if level in self.slots}

    @cached_property
    def places_tensors(self) -> bool:
        """Whether :meth:`step_value` puts tensors into the modules even if no variables are replaced."""
        return bool(not self.in_modules or self.placements is not None or self.task_counts or self.lower_buffers)

    @cached_property
    def _loops(self) -> bool:
        """Whether tasks are evaluated one after the other: on a CPU vectorized convolutions are slower (1.15 x)."""
        on_cpu = self.variables[self.level][0].device.type == "cpu"
        return on_cpu and any(isinstance(module, CONVOLUTIONS) for module in self.reader.modules())

    def _evaluate(self, draw: Draw, tensors: dict[str, Tensor]) -> Value:
        count_forward(self.level)
        batch = (draw.batch,) if self.takes_batch else ()
        if self.precision is None:
            with draw.randomness.replay(self.reader.watch):
                return self._value(self.reader.call(batch, tensors, draw.step))
        with draw.randomness.replay(self.reader.watch), self.precision.evaluate(self.variables[self.level][0].device):
            return self._value(self.reader.call(batch, tensors, draw.step))

    def _mapped(self, draw: Draw, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> Value:
        """Evaluate the loss once for each task; sum the losses for a level with tasks, else average them."""
        count_forward(self.level)
        count = next(iter(self.task_counts.values()))
        own = {name for level in self.task_counts for names in self.slots[level] for name in names}
        copies = {name: torch.stack([buffer] * count) for name, buffer in buffers.items()}
        stacked = {**{name: tensor for name, tensor in tensors.items() if name in own}, **copies}
        shared = {name: tensor for name, tensor in tensors.items() if name not in own}

        def one(batch: Any, mine: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = self._value(self.reader.call(batch, {**shared, **mine}, draw.step))
            return loss, {k: v for k, v in metrics.items() if isinstance(v, Tensor)}

        batch = (draw.batch,) if self.takes_batch else ()
        device = self.variables[self.level][0].device
        precise = nullcontext() if self.precision is None else self.precision.evaluate(device)
        with draw.randomness.replay(self.reader.watch), precise:
            try:
                losses, metrics = (looped if self._loops else vectorized)(one, batch, stacked, count)
            except ValueError as error:
                raise LossError(
                    f"The loss could not be mapped over {count} tasks ({str(error).splitlines()[0]}). Every tensor of "
                    "the batch needs a leading dimension of that size, and a batch may contain only tensors, in "
                    "tuples, lists and dicts.",
                    level=self.level,
                    where=self.where,
                ) from None
        loss = losses.sum() if self.level in self.task_counts else losses.mean()
        return (loss, {key: value.detach().float().mean() for key, value in metrics.items()})

    def _value(self, result: Any) -> Value:
        if isinstance(result, Tensor) and not result.dim() and result.dtype not in _HALF:
            return result, _NO_METRICS
        metrics: Mapping[str, Any] = _NO_METRICS
        loss = result
        if isinstance(result, Mapping):
            if "loss" not in result:
                raise self._error(
                    f"The loss returned a mapping with the keys {sorted(map(str, result))} and no 'loss'. Put the "
                    "scalar to minimise under 'loss'; the other scalars are metrics."
                )
            loss = result["loss"]
            scalars = {key: value for key, value in result.items() if key != "loss" and _is_scalar(value)}
            metrics = {k: v.detach() if isinstance(v, Tensor) else v for k, v in scalars.items()}
        if not isinstance(loss, Tensor):
            raise self._error(
                f"The loss returned {type(loss).__name__}, not a Tensor. Return the scalar itself (no .item()), or a "
                "mapping with 'loss'."
            )
        if loss.numel() != 1:
            raise self._error(
                f"The loss returned a tensor of shape {tuple(loss.shape)}, not a scalar. Reduce it, for example with "
                ".mean()."
            )
        if loss.dim():
            loss = loss.reshape(())
        return loss.float() if loss.dtype in _HALF else loss, metrics

    def _error(self, message: str) -> LossError:
        return LossError(message, level=self.level, where=self.where)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NO_METRICS: Mapping[str, Any] = MappingProxyType({})
_HALF = (torch.float16, torch.bfloat16)


def _copies(slots: Sequence[tuple[str, Slot]], values: Sequence[Tensor | None] | None = None) -> dict[str, Tensor]:
    """Copy the modules' own buffers, or the ``values`` given for them; a buffer of several modules is copied once."""
    copies: dict[int, Tensor] = {}
    tensors = {}
    for index, (name, slot) in enumerate(slots):
        buffer = original(*slot)
        if buffer is not None:
            value = buffer if values is None else values[index]
            if value is not None:
                tensors[name] = copies.setdefault(id(buffer), value.clone())
    return tensors


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
