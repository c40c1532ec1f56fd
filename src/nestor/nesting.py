"""Nestings: how the best responses of several levels are composed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from nestor import tree
from nestor.level import Draw, Level
from nestor.lower_level import LowerLevel, Objective
from nestor.moment import Buffers, Moments
from nestor.responses import attach
from nestor.solvers import SolveState
from nestor.trajectory import Step, Trajectory
from nestor.tree import Params

Solves: TypeAlias = dict[str, SolveState]
"""The state of the linear solve of each level below, by name."""


class Nesting(ABC):
    """Builds the best responses that an objective contains."""

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self.levels = levels

    @abstractmethod
    def respond(
        self, level: Level, live: Mapping[str, Params], moments: Moments, solves: Solves | None = None
    ) -> dict[str, Params]:
        """Add the best responses of the levels below ``level`` to the ``live`` tensors, by level name.

        Args:
            level: The level whose objective is built.
            live: Tensors that stand for the variables of ``level`` and of levels above; all others are constants.
            moments: The levels below: their batches, and the steps that led to their variables.
            solves: What is kept from one linear solve of each level below to the next.
        """

    def _attach(
        self,
        lower: Level,
        inputs: Mapping[str, Params],
        moments: Moments,
        solves: Solves | None,
        *,
        nested: bool,
    ) -> list[Tensor]:
        """Make the variables of ``lower`` its best response to ``inputs``."""
        moment = moments[lower.name]
        sizes = [len(tensors) for tensors in inputs.values()]

        def named(flat: Params) -> dict[str, Params]:
            return dict(zip(inputs, tree.split(flat, sizes), strict=True))

        def on(draws: Sequence[Draw], below: Moments, buffers: Sequence[Buffers] = ()) -> LowerLevel:
            terms = self._terms(lower, named, draws, below, buffers)
            return LowerLevel(lower.name, terms, nested, loss_scale=lower.loss_scale)

        start = _places(lower, list(inputs), sizes)
        solve = None if solves is None else solves.setdefault(lower.name, SolveState())
        here = replace(on(moment.draws, moments), start=start, solve=solve)
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
            here = replace(here, trajectory=trajectory)
        theta = lower.parameters if moment.values is None else moment.values
        return attach(lower.response, here, theta, [t for tensors in inputs.values() for t in tensors])

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

    def respond(
        self, level: Level, live: Mapping[str, Params], moments: Moments, solves: Solves | None = None
    ) -> dict[str, Params]:
        """Highest lower first, so that lower ones respond to its response."""
        known = dict(live)
        for name in reversed(level.lowers):
            lower = self.levels[name]
            inputs = {upper: known[upper] for upper in lower.uppers if upper in known}
            if inputs:
                known[name] = self._attach(lower, inputs, moments, solves, nested=bool(lower.lowers))
        return known

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

    def respond(
        self, level: Level, live: Mapping[str, Params], moments: Moments, solves: Solves | None = None
    ) -> dict[str, Params]:
        """Lowest first, so that higher ones respond to its response."""
        known = dict(live)
        for lower in self.levels.values():
            if lower.index >= level.index:
                break
            inputs = {
                name: known[name]
                for name in lower.depends
                if name in known and (name == level.name or self.levels[name].index < lower.index)
            }
            if inputs and lower.name in moments:
                known[lower.name] = self._attach(lower, inputs, moments, solves, nested=False)
        return known

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
