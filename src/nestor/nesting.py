"""Nestings: how the best responses of several levels are composed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from nestor import tree
from nestor.level import Draw, Level
from nestor.lower_level import LowerLevel, Objective
from nestor.moment import Buffers, Moments
from nestor.responses import attach, respond_back
from nestor.solvers import SolveState
from nestor.trajectory import Step, Trajectory
from nestor.tree import Params

Solves: TypeAlias = dict[str, SolveState]
"""The state of the linear solve of each level below, by name."""


class Nesting(ABC):
    """Builds the best responses that an objective contains."""

    nested: ClassVar[bool]
    """Whether the objective of a lower level contains the responses of its own lowers."""

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self.levels = levels
        self._below: dict[str, list[str]] = {}
        self._orders: dict[tuple[str, ...], list[tuple[Level, tuple[str, ...]]]] = {}

    def order(self, level: Level, live: Iterable[str]) -> list[tuple[Level, tuple[str, ...]]]:
        """List the levels below ``level`` in the order in which they respond, and what each responds to.

        Args:
            level: The level whose objective is built.
            live: Names of the levels whose variables are no constants: ``level``, and levels above.
        """
        key = (level.name, *live)
        if key not in self._orders:
            self._orders[key] = self._order(level, key[1:])
        return self._orders[key]

    def below(self, name: str) -> list[str]:
        """Name the level and all levels that its objective evaluates, lowest first."""
        if name not in self._below:
            found, frontier = {name}, [name]
            while frontier:
                new = [lower for lower in self.levels[frontier.pop()].lowers if lower not in found]
                found.update(new)
                frontier.extend(new)
            self._below[name] = [level for level in self.levels if level in found]
        return self._below[name]

    @abstractmethod
    def _order(self, level: Level, live: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]: ...

    def respond(self, level: Level, live: Mapping[str, Params], moments: Moments) -> dict[str, Params]:
        """Add the best responses of the levels below ``level`` to the ``live`` tensors, as nodes of the graph.

        Args:
            level: The level whose objective is built.
            live: Tensors that stand for the variables of ``level`` and of levels above; all others are constants.
            moments: The levels below: their batches, and the steps that led to their variables.
        """
        known = dict(live)
        for lower, names in self.order(level, live):
            inputs = {name: known[name] for name in names}
            here, theta = self._see(lower, inputs, moments, None)
            known[lower.name] = attach(lower.response, here, theta, [t for values in inputs.values() for t in values])
        return known

    def reach(self, level: Level, moments: Moments, solves: Solves | None) -> list[BestResponse]:
        """Return the best responses of the levels below ``level``, in the order in which they respond.

        What :meth:`respond` builds into one graph, as separate pieces for a first derivative: each is pulled back by
        itself, and what it needs is free before the next one.

        Args:
            level: The level whose objective is built.
            moments: The levels below: their batches, and the steps that led to their variables.
            solves: What is kept from one linear solve of each level below to the next.
        """
        known: dict[str, Params] = {level.name: level.parameters}
        found = []
        for lower, names in self.order(level, (level.name,)):
            inputs = {name: [t.detach() for t in known[name]] for name in names}
            here, theta = self._see(lower, inputs, moments, solves)
            flat = [t for values in inputs.values() for t in values]
            with torch.no_grad():
                here, theta = lower.response.reach(here, theta, flat)
            known[lower.name] = theta
            found.append(BestResponse(lower, here, theta, inputs))
        return found

    def _see(
        self, lower: Level, inputs: Mapping[str, Params], moments: Moments, solves: Solves | None
    ) -> tuple[LowerLevel, Params]:
        """See the level as a function of ``inputs``, and its variables."""
        moment = moments[lower.name]
        sizes = [len(tensors) for tensors in inputs.values()]
        nested = self.nested and bool(lower.lowers)

        def named(flat: Params) -> dict[str, Params]:
            return dict(zip(inputs, tree.split(flat, sizes), strict=True))

        def on(draws: Sequence[Draw], below: Moments, buffers: Sequence[Buffers] = ()) -> LowerLevel:
            terms = self._terms(lower, named, draws, below, buffers)
            return LowerLevel(lower.name, terms, nested, loss_scale=lower.loss_scale)

        start = _places(lower, list(inputs), sizes)
        solve = None if solves is None else solves.setdefault(lower.name, SolveState())
        trajectory = None
        if moment.records:
            steps = [Step(on(r.draws, r.below, r.buffers), r.update, named) for r in moment.records]
            past = [moment.uppers.get(name, [None] * size) for name, size in zip(inputs, sizes, strict=True)]
            trajectory = Trajectory(
                steps,
                moment.states,
                ahead=moment.ahead,
                inputs=[value for values in past for value in values] if moment.uppers else (),
                start=start,
                gradients=moment.gradients,
                input_gradient=_along(moment.input_gradients, inputs),
            )
        terms = self._terms(lower, named, moment.draws, moments, ())
        here = LowerLevel(lower.name, terms, nested, trajectory, start, solve, lower.loss_scale)
        return here, lower.parameters if moment.values is None else moment.values

    @abstractmethod
    def _terms(
        self,
        lower: Level,
        named: Callable[[Params], dict[str, Params]],
        draws: Sequence[Draw],
        below: Moments,
        buffers: Sequence[Buffers],
    ) -> tuple[Objective, ...]:
        """Write the objective of ``lower`` on some batches as a function of its variables and the flat inputs."""


@dataclass(frozen=True)
class BestResponse:
    """The best response of a level, to be pulled back once.

    Attributes:
        level: The level.
        here: The level as its response sees it.
        values: Its variables, taken as the best response.
        inputs: What it responds to, by level name; without graphs.
    """

    level: Level
    here: LowerLevel
    values: Params
    inputs: Mapping[str, Params]

    def pull_back(self, cotangent: Sequence[Tensor | None]) -> dict[str, list[Tensor | None]]:
        """Map a cotangent on the response to cotangents on the inputs, by level name; None stands for zero."""
        theta = [v.detach() for v in self.values]
        flat = [t for values in self.inputs.values() for t in values]
        with torch.no_grad():
            vector = tree.zeros_for_none(cotangent, theta)
            found = respond_back(self.level.response, self.here, theta, flat, vector)
        pieces = iter(found)
        return {name: [next(pieces) for _ in values] for name, values in self.inputs.items()}


def _places(lower: Level, names: Sequence[str], sizes: Sequence[int]) -> list[int] | None:
    """Find the inputs that the level's variables start from among the flat ones."""
    if lower.problem.init not in names:
        return None
    before = sum(sizes[: names.index(lower.problem.init)])
    return [before + place for place in lower.start]


def _along(gradients: Mapping[str, Sequence[Tensor | None]], inputs: Mapping[str, Params]) -> list[Tensor | None]:
    """Line the gradients of levels above up with the flat inputs; nothing if they are not known."""
    if not gradients:
        return []
    return [g for name, values in inputs.items() for g in gradients.get(name, [None] * len(values))]


def _constants(below: Moments) -> dict[str, Params]:
    return {name: moment.values for name, moment in below.items() if moment.values is not None}


class Exact(Nesting):
    r"""The objective of every level contains the best responses of its lowers.

    .. math:: \text{objective}_k(\theta_k, \text{uppers}) = \text{loss}_k(\theta_k, \text{uppers},
        \{\theta_l^*(\theta_k, \text{uppers})\}_{l \in \text{lowers}(k)})

    so the curvature of a level in the middle contains the response of the levels below it.
    """

    nested = True

    def _order(self, level: Level, live: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]:
        """Highest lower first, so that lower ones respond to its response."""
        known = set(live)
        order = []
        for name in reversed(level.lowers):
            lower = self.levels[name]
            inputs = tuple(upper for upper in lower.uppers if upper in known)
            if inputs:
                known.add(name)
                order.append((lower, inputs))
        return order

    def _terms(
        self,
        lower: Level,
        named: Callable[[Params], dict[str, Params]],
        draws: Sequence[Draw],
        below: Moments,
        buffers: Sequence[Buffers],
    ) -> tuple[Objective, ...]:
        """One term a batch; with levels below, one for all, since the batches share the responses."""
        noted: Sequence[Buffers | None] = buffers or [None] * len(draws)

        def term(draw: Draw, held: Buffers | None) -> Objective:
            return lambda theta, flat: lower.pure_value(draw, {lower.name: theta, **named(flat)}, held)

        def nested(theta: Params, flat: Params) -> Tensor:
            known = self.respond(lower, {lower.name: theta, **named(flat)}, below)
            known = {**_constants(below), **known}
            values = [lower.pure_value(draw, known, held) for draw, held in zip(draws, noted, strict=True)]
            return values[0] if len(values) == 1 else torch.stack(values).mean()

        return (nested,) if lower.lowers else tuple(map(term, draws, noted))


class Frozen(Nesting):
    """One response per level below, lowest first, with every level in between a constant.

    The inputs of a response are the responses of the level's own lowers, as separate inputs, and the variables of the
    level whose hypergradient is taken. This is the sum over all downward paths of the program, with one response
    evaluation per level and no second derivative through a response; an approximation (Choe et al., Betty, ICLR 2023).
    """

    nested = False

    def _order(self, level: Level, live: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]:
        """Lowest first, so that higher ones respond to its response."""
        known = set(live)
        order = []
        for lower in (self.levels[name] for name in self.below(level.name)[:-1]):
            inputs = tuple(
                name
                for name in lower.depends
                if name in known and (name == level.name or self.levels[name].index < lower.index)
            )
            if inputs:
                known.add(lower.name)
                order.append((lower, inputs))
        return order

    def _terms(
        self,
        lower: Level,
        named: Callable[[Params], dict[str, Params]],
        draws: Sequence[Draw],
        below: Moments,
        buffers: Sequence[Buffers],
    ) -> tuple[Objective, ...]:
        """One term a batch; all other levels are constants."""
        constants = _constants(below)

        def term(draw: Draw, held: Buffers | None) -> Objective:
            return lambda theta, flat: lower.pure_value(draw, {**constants, lower.name: theta, **named(flat)}, held)

        noted: Sequence[Buffers | None] = buffers or [None] * len(draws)
        return tuple(map(term, draws, noted))
