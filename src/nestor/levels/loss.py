"""The loss of a level, evaluated at the modules' own tensors or at other tensors."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import count_forward
from nestor.autodiff.precision import LossScale, Precision
from nestor.autodiff.scope import Slot, original
from nestor.data.draws import Draw
from nestor.errors import LossError
from nestor.levels.placement import Placement
from nestor.levels.reader import Reader, replacements
from nestor.levels.tasks import TaskMap
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
        tasks: Evaluates the loss for each task of the levels with tasks that it reads; None if it reads none.
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
    tasks: TaskMap | None
    in_modules: bool = True
    precision: Precision | None = None
    placements: Mapping[str, Placement] | None = None

    @cached_property
    def scaling(self) -> LossScale | None:
        """The loss scale of fp16; None for other precisions."""
        return self.precision.scaling if self.precision is not None else None

    @property
    def scale(self) -> Tensor | None:
        """The factor that multiplies the loss before its reverse pass; None means 1."""
        return None if self.scaling is None else self.scaling.scale

    def saved_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers and constants that the level's own step may change with copies of their values."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for _, slot in self.buffers:
            buffer = original(*slot)
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = (buffer, buffer.clone())
        return [*copies.values(), *(() if self.reader.constants is None else self.reader.constants.saved())]

    def buffer_values(self) -> list[Tensor | None]:
        """Copy the values of the buffers that the loss reads, in the order of ``buffers``, and of its constants."""
        copies = _copies(self.buffers)
        held = [copies.get(name) for name, _ in self.buffers]
        return held if self.reader.constants is None else held + self.reader.constants.values()

    def step_value(
        self,
        draw: Draw,
        replaced: Mapping[str, Params],
        noted: list[Buffers] | None = None,
        *,
        keeps_graph: bool = False,
    ) -> Value:
        """Evaluate the loss for the level's own step.

        The modules contain their own parameters, except the ``replaced`` ones. The loss updates buffers (BatchNorm's
        statistics) of the level's modules, but not those of the levels below, and constants (a teacher). The values
        of all these before the evaluation are appended to ``noted``. With ``keeps_graph``, the graph is differentiated
        after other evaluations, so it contains copies of the buffers.
        """
        if noted is not None:
            noted.append(self.buffer_values())
        constants = self.reader.constants
        if constants is None:
            in_place = not replaced and not self.places_tensors
            return self._evaluate(draw, {}) if in_place else self._step_value(draw, replaced, keeps_graph)
        constants.look()
        value = self._step_value(draw, replaced, keeps_graph)
        constants.look()
        return value

    def _step_value(self, draw: Draw, replaced: Mapping[str, Params], keeps_graph: bool) -> Value:
        if not self.in_modules or self.placements is not None:
            replaced = {**{level: self.variables[level] for level in self.slots}, **replaced}
        if self.tasks is not None:
            known = {level: self.variables[level] for level in self.slots}
            return self._mapped(draw, replacements({**known, **replaced}, self.slots), _copies(self.buffers))
        if self.placements is not None:
            replaced = self._whole(replaced)
        tensors = replacements(replaced, self.slots) if replaced else {}
        if keeps_graph and self.buffers:
            value = self._evaluate(draw, {**tensors, **_copies(self.buffers)})
            self._write_back()
            return value
        if self.lower_buffers:
            tensors.update(_copies(self.lower_buffers))
        return self._evaluate(draw, tensors)

    def _write_back(self) -> None:
        """Give the buffers of the level's modules the values that the modules hold in the active scope."""
        lower = {name for name, _ in self.lower_buffers}
        with torch.no_grad():
            for name, (owner, key) in self.buffers:
                buffer, now = original(owner, key), owner[key]
                if buffer is not None and now is not None and name not in lower:
                    buffer.resize_(now.shape).copy_(now)

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
            known = replaced
            if not self.slots.keys() <= replaced.keys():
                rest = [level for level in self.slots if level not in replaced]
                known = {**{level: [p.detach() for p in self.variables[level]] for level in rest}, **replaced}
            tensors = replacements(known if self.placements is None else self._whole(known), self.slots)
        copies = _copies(self.buffers, buffers) if self.buffers else {}
        constants = self.reader.constants
        if constants is None:
            return self._pure_value(draw, tensors, copies)
        placed = constants.placed(buffers[len(self.buffers) :] if buffers else None)
        value = self._pure_value(draw, {**tensors, **placed}, copies)
        constants.check(placed)
        return value

    def _pure_value(self, draw: Draw, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> Tensor:
        if self.tasks is not None:
            return self._mapped(draw, tensors, copies)[0]
        tensors.update(copies)
        return self._evaluate(draw, tensors)[0]

    def moving_value(self, draw: Draw, replaced: Mapping[str, Params], buffers: Sequence[Tensor | None]) -> Value:
        """Evaluate the loss of one task as a function of the ``replaced`` variables; it updates ``buffers`` in place.

        Args:
            draw: The batch.
            replaced: Tensors to use for the variables of all levels that the loss reads, by level name.
            buffers: Values of the buffers, as :meth:`buffer_values` returned them.
        """
        tensors = replacements(replaced, self.slots)
        tensors.update({name: b for (name, _), b in zip(self.buffers, buffers, strict=False) if b is not None})
        return self._evaluate(draw, tensors)

    def _whole(self, held: Mapping[str, Params]) -> Mapping[str, Params]:
        """Gather this process's shards into the whole tensors that the loss reads."""
        assert self.placements is not None
        return {level: self.placements[level].to_loss(values) for level, values in held.items() if level in self.slots}

    @cached_property
    def places_tensors(self) -> bool:
        """Whether :meth:`step_value` puts tensors into the modules even if no variables are replaced."""
        return bool(not self.in_modules or self.placements is not None or self.tasks or self.lower_buffers)

    def _evaluate(self, draw: Draw, tensors: dict[str, Tensor]) -> Value:
        count_forward(self.level)
        reader, batch = self.reader, (draw.batch,) if self.takes_batch else ()
        if self.precision is None:
            return self._value(draw.randomness.call(reader.watch, reader.call, batch, tensors, draw.step))
        with self.precision.evaluate(self.variables[self.level][0].device):
            return self._value(draw.randomness.call(reader.watch, reader.call, batch, tensors, draw.step))

    def _mapped(self, draw: Draw, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> Value:
        """Evaluate the loss once for each task; sum the losses for a level with tasks, else average them."""
        assert self.tasks is not None
        count_forward(self.level)
        own = {name for level in self.tasks.levels for names in self.slots[level] for name in names}
        copies = {name: torch.stack([buffer] * self.tasks.count) for name, buffer in buffers.items()}
        stacked = {**{name: tensor for name, tensor in tensors.items() if name in own}, **copies}
        shared = {name: tensor for name, tensor in tensors.items() if name not in own}

        def one(batch: Any, tensors: dict[str, Tensor]) -> Value:
            return self._value(self.reader.call(batch, tensors, draw.step))

        batch = (draw.batch,) if self.takes_batch else ()
        device = self.variables[self.level][0].device
        precise = nullcontext() if self.precision is None else self.precision.evaluate(device)
        with draw.randomness.replay(self.reader.watch), precise:
            losses, metrics = self.tasks.evaluate(one, batch, stacked, shared)
        loss = losses.sum() if self.level in self.tasks.levels else losses.mean()
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
