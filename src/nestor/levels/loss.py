"""The loss of a level, evaluated at the modules' own tensors or at other tensors."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nestor.autodiff.instruments import count_forward
from nestor.autodiff.precision import LossScale, Precision
from nestor.autodiff.scope import Scope, Slot, original, place
from nestor.autodiff.torch_private import tensor_slot
from nestor.autodiff.vmap import looped, vectorized
from nestor.data.draws import Draw
from nestor.errors import LossError
from nestor.levels.placement import Placement
from nestor.vectors import Params


class Reader(nn.Module):
    """Contains the modules that a function reads, and calls the function with other tensors in the modules.

    The modules have prefixed names, because a level may be called ``forward`` or ``module``.

    Attributes:
        function: The function, in a tuple: one that is a module must not become a part of the reader.
        only_once: Makers of errors for a function that cannot be differentiated twice.
    """

    def __init__(self, function: Callable[..., Any], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.function = (function,)
        self.only_once: list[Callable[[], Exception]] = []
        self._arguments = dict(modules)
        self._slots: dict[str, Slot] = {}
        for name, module in modules.items():
            self.add_module(f"level_{name}", module)

    def call(self, arguments: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Call the function with other tensors as named parameters and buffers.

        The tensors stay in the modules until the innermost :class:`~nestor.autodiff.scope.Scope` exits; without a
        scope, until the function returns. Slots are cached: a lookup by name takes as long as a small loss.
        """
        slots = self._slots
        placed = [(slots.get(name) or self._slot(name), tensor) for name, tensor in tensors.items()]
        if not placed or place(placed):
            return self.function[0](*arguments, **self._arguments)
        with Scope():
            place(placed)
            return self.function[0](*arguments, **self._arguments)

    def _slot(self, name: str) -> Slot:
        return self._slots.setdefault(name, tensor_slot(self, name))

    def aliases(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, ...]]:
        """List the names of each parameter within the reader; none if no module of the reader contains it.

        A parameter of several modules (tied weights) has a name in each. A module that is reachable by several paths
        is named once: replacing the same slot twice would lose the slot's own tensor.
        """
        names: dict[int, list[str]] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        return [tuple(names.get(id(parameter), ())) for parameter in parameters]

    def buffer_slots(self, owners: Collection[nn.Module] | None = None) -> list[tuple[str, Slot]]:
        """List the buffers of all modules that are read, or of those among ``owners``, by name in the reader."""
        return [
            (name, self._slot(name))
            for prefix, module in self.named_modules()
            if owners is None or module in owners
            for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False)
            for name in (f"{prefix}.{attribute}",)
        ]


def replacements(replaced: Mapping[str, Params], slots: Mapping[str, Sequence[tuple[str, ...]]]) -> dict[str, Tensor]:
    """Name the tensors of some levels by their slots in a reader; a tied tensor has several names."""
    named = {}
    for level, values in replaced.items():
        for value, names in zip(values, slots.get(level, ()), strict=False):
            for name in names:
                named[name] = value
    return named


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
    def scaling(self) -> LossScale | None:
        """The loss scale of fp16; None for other precisions."""
        return self.precision.scaling if self.precision is not None else None

    @property
    def scale(self) -> Tensor | None:
        """The factor that multiplies the loss before its reverse pass; None means 1."""
        return None if self.precision is None or self.precision.scaling is None else self.precision.scaling.scale

    def saved_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers that the level's own step may change with copies of their values."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for _, slot in self.buffers:
            buffer = original(*slot)
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = (buffer, buffer.clone())
        return list(copies.values())

    def buffer_values(self) -> list[Tensor | None]:
        """Copy the values of the buffers that the loss reads, in the order of ``buffers``."""
        copies = _copies(self.buffers)
        return [copies.get(name) for name, _ in self.buffers]

    def step_value(self, draw: Draw, replaced: Mapping[str, Params]) -> Value:
        """Evaluate the loss for the level's own step.

        The modules contain their own parameters, except the ``replaced`` ones. The loss updates buffers (BatchNorm's
        statistics) of the level's modules, but not those of the levels below.
        """
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
        self, draw: Draw, replaced: Mapping[str, Params], buffers: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Evaluate the loss as a function of the ``replaced`` variables; every other tensor is a constant.

        The evaluation has no side effect: it uses copies of the buffers, and replays the random numbers of the draw.

        Args:
            draw: The batch.
            replaced: Tensors to use for the variables of some levels, by level name.
            buffers: Values of the buffers, as :meth:`buffer_values` returned them; None uses the current ones.
        """
        known = dict(replaced)
        for level in self.slots:
            if level not in known:
                known[level] = [p.detach() for p in self.variables[level]]
        tensors = replacements(known if self.placements is None else self._whole(known), self.slots)
        copies = _copies(self.buffers, buffers) if self.buffers else {}
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
            with draw.randomness.replay():
                return self._value(self.reader.call(batch, tensors))
        with draw.randomness.replay(), self.precision.evaluate(self.variables[self.level][0].device):
            return self._value(self.reader.call(batch, tensors))

    def _mapped(self, draw: Draw, tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> Value:
        """Evaluate the loss once for each task; sum the losses for a level with tasks, else average them."""
        count_forward(self.level)
        count = next(iter(self.task_counts.values()))
        own = {name for level in self.task_counts for names in self.slots[level] for name in names}
        copies = {name: torch.stack([buffer] * count) for name, buffer in buffers.items()}
        stacked = {**{name: tensor for name, tensor in tensors.items() if name in own}, **copies}
        shared = {name: tensor for name, tensor in tensors.items() if name not in own}

        def one(batch: Any, mine: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = self._value(self.reader.call(batch, {**shared, **mine}))
            return loss, {k: v for k, v in metrics.items() if isinstance(v, Tensor)}

        batch = (draw.batch,) if self.takes_batch else ()
        device = self.variables[self.level][0].device
        precise = nullcontext() if self.precision is None else self.precision.evaluate(device)
        with draw.randomness.replay(), precise:
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
            metrics = {key: v.detach() if isinstance(v, Tensor) else v for key, v in scalars.items()}
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
