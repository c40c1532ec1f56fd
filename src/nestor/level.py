"""A level of a validated program: its variables, what its loss reads, and how the loss is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import LossError
from nestor.evaluations import count_forward
from nestor.problem import Loss, Problem
from nestor.randomness import Randomness
from nestor.responses import Response
from nestor.tree import Params


@dataclass(frozen=True)
class Draw:
    """One batch, and the random numbers that its evaluations see."""

    batch: Any
    randomness: Randomness


@dataclass(frozen=True)
class Value:
    """What a loss returned: the scalar to minimise and the metrics beside it."""

    loss: Tensor
    metrics: Mapping[str, Any]


class Reader(nn.Module):
    """Holds the modules that a loss reads, so that ``functional_call`` can replace the tensors of all of them.

    The modules stand under prefixed names: a level may be called ``forward`` or ``module``.
    """

    def __init__(self, loss: Loss, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # In a tuple: a loss that is itself a module must not become a part of the reader.
        self._loss = (loss,)
        # In a plain dict: torch has them once already, under the prefixed names.
        self._arguments = dict(modules)
        for name, module in modules.items():
            self.add_module(f"level_{name}", module)

    def forward(self, *batch: Any) -> Any:
        """Call the loss."""
        return self._loss[0](*batch, **self._arguments)

    def aliases(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, ...]]:
        """List the names of each parameter within the reader; none if no module that is read holds it.

        A parameter that several modules hold (tied weights) has a name in each. A module that is reachable in several
        ways is named once: to replace the same slot twice is to lose what it held.
        """
        names: dict[int, list[str]] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        return [tuple(names.get(id(parameter), ())) for parameter in parameters]

    def buffer_slots(self) -> list[tuple[str, nn.Module, str]]:
        """List the buffers of all modules that are read, as (name in the reader, owner, attribute)."""
        return [
            (f"{prefix}.{attribute}", module, attribute)
            for prefix, module in self.named_modules()
            for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False)
        ]


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
        lowers: The levels below whose best responses its objective contains, in the program's order.
        uppers: The levels above on which its objective depends, in the program's order.
        parameters: Its variables.
        names: Their names in ``module.named_parameters()``.
        response: How the levels above differentiate through it.
        reader: Evaluates the loss with other tensors in the place of parameters.
        slots: For every level read, the names of its variables within the reader.
    """

    name: str
    index: int
    problem: Problem
    where: str
    takes_batch: bool
    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    lowers: tuple[str, ...]
    uppers: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    response: Response
    reader: Reader
    slots: Mapping[str, Sequence[tuple[str, ...]]]
    constants: Mapping[str, tuple[nn.Parameter, ...]]
    all_buffers: Sequence[tuple[str, nn.Module, str]]
    lower_buffers: Sequence[tuple[str, nn.Module, str]]

    def own_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers that the level's own step may move with copies of their values."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for _, module, attribute in self.all_buffers:
            buffer = getattr(module, attribute)
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = (buffer, buffer.clone())
        return list(copies.values())

    def step_value(self, draw: Draw, replaced: Mapping[str, Params]) -> Value:
        """Evaluate the loss for the level's own step.

        The real parameters are in place but for those of the levels below, which are ``replaced``. The statistics of
        the modules move (BatchNorm's), those of the levels below do not.
        """
        if not self.lowers:
            return self._evaluate(draw, None)
        tensors = dict(self._tensors(replaced))
        tensors.update(_copies(self.lower_buffers))
        return self._evaluate(draw, tensors)

    def pure_value(self, draw: Draw, replaced: Mapping[str, Params]) -> Tensor:
        """Evaluate the loss as a function of the ``replaced`` variables; every other tensor is a constant.

        Leaves no trace: buffers are copies, random numbers those of the draw.
        """
        tensors = {
            name: parameter.detach()
            for level, parameters in self.constants.items()
            if level not in replaced
            for parameter, names in zip(parameters, self.slots[level], strict=True)
            for name in names
        }
        tensors.update(self._tensors(replaced))
        tensors.update(_copies(self.all_buffers))
        return self._evaluate(draw, tensors).loss

    def _tensors(self, replaced: Mapping[str, Params]) -> Iterator[tuple[str, Tensor]]:
        for level, values in replaced.items():
            for value, names in zip(values, self.slots.get(level, ()), strict=False):
                for name in names:
                    yield name, value

    def _evaluate(self, draw: Draw, tensors: dict[str, Tensor] | None) -> Value:
        count_forward(self.name)
        batch = (draw.batch,) if self.takes_batch else ()
        with draw.randomness.replay():
            if tensors is None:
                result = self.reader.forward(*batch)
            else:
                # Every alias of a tied parameter is among the names, so torch need not look for them.
                result = torch.func.functional_call(self.reader, tensors, batch, tie_weights=False)
        return self._value(result)

    def _value(self, result: Any) -> Value:
        metrics: Mapping[str, Any] = {}
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
        return Value(loss.reshape(()), metrics)


def _copies(slots: Sequence[tuple[str, nn.Module, str]]) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}
    tensors = {}
    for name, module, attribute in slots:
        buffer = getattr(module, attribute)
        if buffer is not None:
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.clone()
            tensors[name] = copies[id(buffer)]
    return tensors


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
