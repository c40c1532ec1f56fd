"""A program as a user writes it, and the plain losses that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from truth import MOMENTUM, RATE, UPPER_MOMENTUM, Lower, Rule, Upper, momentum

import nestor
from nestor.callbacks import Callback

SAMPLES = 6
Loss = Callable[..., Any]
Plain = Callable[[Callable[..., Any], Any, Tensor, int], Tensor]
Batch = tuple[Any, Tensor, Tensor]
"""Inputs, targets, and the places of the rows in the whole batch, by which samples are weighted."""


def inputs(shift: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(shift)
    x, y = torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    return x.double(), y.double(), torch.arange(SAMPLES)


def tokens(shift: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(shift)
    words = torch.randint(0, 5, (SAMPLES, 4), generator=generator)
    return words, torch.randn(SAMPLES, 1, generator=generator).double(), torch.arange(SAMPLES)


def rows_of(batch: Any, rank: int, size: int) -> Any:
    """Return the rows that one of ``size`` processes evaluates."""
    if isinstance(batch, tuple) and not isinstance(batch, PackedSequence):
        return tuple(rows_of(part, rank, size) for part in batch)
    if isinstance(batch, PackedSequence):
        padded, lengths = pad_packed_sequence(batch, batch_first=True)
        part = rows_of((padded, lengths), rank, size)
        return pack_padded_sequence(*part, batch_first=True, enforce_sorted=False)
    each = len(batch) // size
    return batch[rank * each : (rank + 1) * each]


def weighted(out: Tensor, batch: Any, w: Tensor) -> Tensor:
    return (torch.sigmoid(w)[batch[2]] * (out - batch[1]).square().squeeze(1)).mean()


def weighted_loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
    return weighted(net(batch[0]), batch, w())


def clean_loss(batch: Any, net: nn.Module) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


@dataclass
class Setup:
    """A program of two levels, ``net`` and ``w``, and what it means.

    Attributes:
        net: The lower module.
        twin: A module of the same parameters without what makes the kind.
        loss: The lower loss as the user writes it; None is the loss of weighted samples.
        plain: The same in terms of ``twin(...)``, the weights and the step; None is the loss of weighted samples.
        upper: The upper loss as the user writes it.
        plain_upper: The same in terms of ``twin(...)``.
        data: Batches of the lower and of the upper level.
        loader: What the user gives as the data of a level: the batch, again and again.
        make: Makes the lower optimizer.
        rule: The steps of this optimizer.
        options: Returns other arguments of the lower problem, once its optimizer is made.
        prepare: Changes the module and its optimizer, as the user does.
        callbacks: Callbacks of the run.
        shared: Name of the parameter of ``net`` that is the upper variable; empty is a variable of its own.
        record: What each step of the lower level has drawn in this process, which ``plain`` reads.
    """

    net: nn.Module
    twin: nn.Module | None = None
    loss: Loss = weighted_loss
    plain: Plain = lambda call, batch, w, step: weighted(call(batch[0]), batch, w)
    upper: Loss = clean_loss
    plain_upper: Callable[[Callable[..., Any], Any], Tensor] = lambda call, batch: (
        (call(batch[0]) - batch[1]).square().mean()
    )
    data: Callable[[int], Batch] = inputs
    loader: Callable[[Batch], Any] = lambda batch: [batch]
    make: Callable[[nn.Module], torch.optim.Optimizer] = lambda net: torch.optim.SGD(
        net.parameters(), lr=RATE, momentum=MOMENTUM
    )
    rule: Rule = momentum
    options: Callable[[], Mapping[str, Any]] = dict
    prepare: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda net, optimizer: None
    callbacks: Sequence[Callback] = field(default_factory=tuple)
    shared: str = ""
    record: list[Any] = field(default_factory=list)

    def program(self, response: nestor.Response, steps: int) -> nestor.Program:
        """Declare it."""
        optimizer = self.make(self.net)
        self.prepare(self.net, optimizer)
        options = dict(self.options())
        if self.shared:
            options["variables"] = [p for name, p in self.net.named_parameters() if name != self.shared]
        return nestor.Program(
            net=nestor.Problem(
                self.net,
                self.loss,
                data=self.loader(self.data(0)),
                optimizer=optimizer,
                response=response,
                unroll_steps=steps,
                **options,
            ),
            w=nestor.Problem(
                self.net if self.shared else self.own,
                self.upper,
                variables=[self.weights],
                data=self.loader(self.data(1)),
                optimizer=torch.optim.SGD([self.weights], lr=1.0, momentum=UPPER_MOMENTUM),
            ),
        )

    @cached_property
    def own(self) -> nn.Module:
        return nestor.Variable(torch.linspace(-0.5, 0.5, SAMPLES).double())

    @property
    def weights(self) -> nn.Parameter:
        """The upper variable."""
        return self.net.get_parameter(self.shared) if self.shared else next(self.own.parameters())

    def named(self) -> dict[str, nn.Parameter]:
        """Return the lower variables by name."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad and name != self.shared}

    def variables(self) -> list[Tensor]:
        """Copy the lower variables."""
        return [p.detach().clone() for p in self.named().values()]

    def functions(self, records: Sequence[list[Any]]) -> tuple[Lower, Upper]:
        """Return the plain losses: their means over processes, each with its rows and what it has drawn."""
        twin, size = self.twin or self.net, len(records)
        names = list(self.named())
        train, clean = ([rows_of(self.data(k), rank, size) for rank in range(size)] for k in (0, 1))

        def at(theta: Sequence[Tensor]) -> Callable[..., Any]:
            known = dict(zip(names, theta, strict=True))
            return lambda x, buffers=None: functional_call(twin, {**known, **(buffers or {})}, (x,))

        def mean(loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> Tensor:
            total = []
            for batch, record in zip(batches, records, strict=True):
                self.record[:] = record
                total.append(loss(batch))
            return torch.stack(total).mean()

        return (
            lambda theta, w, step: mean(lambda batch: self.plain(at(theta), batch, w, step), train),
            lambda theta: mean(lambda batch: self.plain_upper(at(theta), batch), clean),
        )


class AfterStep(Callback):
    """Calls a function after every step of the lower level."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def on_level_step(self, run: Any, level: str) -> None:
        if level == "net":
            with torch.no_grad():
                self.function()
