"""Nestings: how the best responses of several levels are composed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from nestor.levels.level import Draw, Level
from nestor.levels.moment import Buffers, Moment, Moments, Record
from nestor.responses import attach, respond_back
from nestor.responses.lower_level import LowerLevel, Objective
from nestor.responses.unrolling.trajectory import Step, Trajectory
from nestor.solvers import SolveState
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

Solves: TypeAlias = dict[str, SolveState]
"""The state of the linear solve of each level below, by name."""


class Follower(NamedTuple):
    """A level that responds, and what it responds to.

    Attributes:
        level: The level.
        sizes: The levels that it responds to, and how many variables they have, in the order of the flat inputs.
        start: The flat inputs that its variables start from (``Problem(init=...)``); None if they do not.
    """

    level: Level
    sizes: Mapping[str, int]
    start: Sequence[int] | None

    @classmethod
    def of(cls, level: Level, sizes: Mapping[str, int]) -> Follower:
        """Find what the level starts from among its inputs."""
        init = level.problem.init
        if init is None or init not in sizes:
            return cls(level, sizes, None)
        names = list(sizes)
        before = sum(sizes[name] for name in names[: names.index(init)])
        return cls(level, sizes, [before + place for place in level.start])

    def named(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Sort flat inputs by level."""
        found, at = {}, 0
        for name, size in self.sizes.items():
            found[name] = list(flat[at : at + size])
            at += size
        return found


class Nesting(ABC):
    """Builds the best responses that an objective contains."""

    nested: ClassVar[bool]
    """Whether the objective of a lower level contains the responses of its own lowers."""

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self.levels = levels
        self._below: dict[str, list[str]] = {}
        self._orders: dict[tuple[str, ...], list[Follower]] = {}

    def order(self, level: Level, live: Iterable[str]) -> list[Follower]:
        """List the levels below ``level`` in the order in which they respond, and what each responds to.

        Args:
            level: The level whose objective is built.
            live: Names of the levels whose variables are no constants: ``level``, and levels above.
        """
        key = (level.name, *live)
        if key not in self._orders:
            self._orders[key] = [
                Follower.of(lower, {name: len(self.levels[name].parameters) for name in names})
                for lower, names in self._order(level, key[1:])
            ]
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
        for follower in self.order(level, live):
            lower = follower.level
            here, theta = self._see(follower, moments, None)
            known[lower.name] = attach(lower.response, here, theta, [t for name in follower.sizes for t in known[name]])
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
        for follower in self.order(level, (level.name,)):
            inputs = [t.detach() for name in follower.sizes for t in known[name]]
            here, theta = self._see(follower, moments, solves)
            if here.trajectory is not None:
                with torch.no_grad():
                    here, theta = follower.level.response.reach(here, theta, inputs)
            known[follower.level.name] = theta
            found.append(BestResponse(follower, here, theta, inputs))
        return found

    def _see(self, follower: Follower, moments: Moments, solves: Solves | None) -> tuple[LowerLevel, Params]:
        """See the level as a function of what it responds to, and its variables."""
        lower = follower.level
        moment = moments[lower.name]
        nested = self.nested and bool(lower.lowers)
        solve = None
        if solves is not None:
            solve = solves.get(lower.name) or solves.setdefault(lower.name, SolveState())
        trajectory = self._trajectory(follower, moment, nested=nested) if moment.records else None
        terms = self._terms(lower, follower.named, moment.draws, moments, ())
        here = LowerLevel(
            lower.name, terms, nested, trajectory, follower.start, solve, lower.loss_scale, moment.once, lower.space
        )
        return here, lower.parameters if moment.values is None else moment.values

    def _trajectory(self, follower: Follower, moment: Moment, *, nested: bool) -> Trajectory:
        lower, named = follower.level, follower.named

        def on(record: Record) -> LowerLevel:
            terms = self._terms(lower, named, record.draws, record.below, record.buffers)
            return LowerLevel(lower.name, terms, nested, loss_scale=lower.loss_scale, space=lower.space)

        def step(record: Record) -> Step:
            def elsewhere(batches: Sequence[Any]) -> LowerLevel:
                draws = tuple(draw._replace(batch=b) for draw, b in zip(record.draws, batches, strict=True))
                return on(replace(record, draws=draws))

            graphs = None if nested or record.below else lower.graphs
            kept = record.kept if record.kept is not None and record.kept.is_whole else None
            return Step(on(record), record.update, named, [d.batch for d in record.draws], elsewhere, graphs, kept)

        past = [moment.uppers.get(name, [None] * size) for name, size in follower.sizes.items()]
        return Trajectory(
            [step(record) for record in moment.records],
            moment.states,
            ahead=moment.ahead,
            inputs=[value for values in past for value in values] if moment.uppers else (),
            start=follower.start,
            gradients=moment.gradients,
            input_gradient=_along(moment.input_gradients, follower.sizes),
            after=moment.after,
        )

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


class BestResponse(NamedTuple):
    """The best response of a level, to be pulled back once.

    Attributes:
        follower: The level, and what it responds to.
        here: The level as its response sees it.
        values: Its variables, taken as the best response.
        inputs: The tensors that it responds to; without graphs.
    """

    follower: Follower
    here: LowerLevel
    values: Params
    inputs: Params

    def pull_back(self, cotangent: list[Tensor | None]) -> dict[str, list[Tensor | None]]:
        """Map a cotangent on the response to cotangents on the inputs, by level name; None stands for zero.

        Where the moment is for this response alone, the cotangent is replaced by its norm.
        """
        theta = [v.detach() for v in self.values]
        with torch.no_grad():
            vector = algebra.zeros_for_none(cotangent, theta)
            if self.here.once:
                cotangent[:] = [self.here.space.norm(vector)]
            found = respond_back(self.follower.level.response, self.here, theta, self.inputs, vector)
        return self.follower.named(found)


def _along(gradients: Mapping[str, Sequence[Tensor | None]], sizes: Mapping[str, int]) -> list[Tensor | None]:
    """Line the gradients of levels above up with the flat inputs; nothing if they are not known."""
    if not gradients:
        return []
    return [g for name, size in sizes.items() for g in gradients.get(name, [None] * size)]


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
        name = lower.name

        def term(draw: Draw, held: Buffers | None) -> Objective:
            return lambda theta, flat: lower.pure_value(draw, {name: theta, **named(flat)}, held)

        if not lower.lowers:
            return tuple(term(draw, held) for draw, held in zip(draws, noted, strict=True))

        def nested(theta: Params, flat: Params) -> Tensor:
            known = self.respond(lower, {lower.name: theta, **named(flat)}, below)
            known = {**_constants(below), **known}
            values = [lower.pure_value(draw, known, held) for draw, held in zip(draws, noted, strict=True)]
            return values[0] if len(values) == 1 else torch.stack(values).mean()

        return (nested,)


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
