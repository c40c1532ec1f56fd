"""Nestings: how the best responses of several levels are composed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from nestor import tree
from nestor.level import Draw, Level
from nestor.lower_level import LowerLevel, Objective
from nestor.responses import attach
from nestor.tree import Params

Draws: TypeAlias = Mapping[str, tuple[Draw, ...]]
"""The batches of each level's last step, by level name."""


class Nesting(ABC):
    """Builds the best responses that an objective contains."""

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self.levels = levels

    @abstractmethod
    def respond(self, level: Level, live: Mapping[str, Params], draws: Draws) -> dict[str, Params]:
        """Add the best responses of the levels below ``level`` to the ``live`` tensors, by level name.

        Args:
            level: The level whose objective is built.
            live: Tensors that stand for the variables of ``level`` and of levels above; all others are constants.
            draws: The batches to evaluate the levels below on.
        """

    def _attach(
        self, lower: Level, inputs: Mapping[str, Params], objective: tuple[Objective, ...], *, nested: bool
    ) -> list[Tensor]:
        flat = [t for tensors in inputs.values() for t in tensors]
        return attach(lower.response, LowerLevel(lower.name, objective, nested), lower.parameters, flat)


class Exact(Nesting):
    r"""The objective of every level contains the best responses of its lowers.

    .. math:: \text{objective}_k(\theta_k, \text{uppers}) = \text{loss}_k(\theta_k, \text{uppers},
        \{\theta_l^*(\theta_k, \text{uppers})\}_{l \in \text{lowers}(k)})

    so the curvature of a level in the middle contains the response of the levels below it.
    """

    def respond(self, level: Level, live: Mapping[str, Params], draws: Draws) -> dict[str, Params]:
        """Highest lower first, so that lower ones respond to its response."""
        known = dict(live)
        for name in reversed(level.lowers):
            lower = self.levels[name]
            inputs = {upper: known[upper] for upper in lower.uppers if upper in known}
            if inputs:
                known[name] = self._attach(
                    lower, inputs, self._objective(lower, inputs, draws), nested=bool(lower.lowers)
                )
        return known

    def _objective(self, lower: Level, inputs: Mapping[str, Params], draws: Draws) -> tuple[Objective, ...]:
        sizes = [len(tensors) for tensors in inputs.values()]

        def live(theta: Params, flat: Params) -> dict[str, Params]:
            return {lower.name: theta, **dict(zip(inputs, tree.split(flat, sizes), strict=True))}

        def term(draw: Draw) -> Objective:
            return lambda theta, flat: lower.pure_value(draw, live(theta, flat))

        def nested(theta: Params, flat: Params) -> Tensor:
            # The micro-batches share the responses, so they are one term.
            known = self.respond(lower, live(theta, flat), draws)
            return torch.stack([lower.pure_value(draw, known) for draw in draws[lower.name]]).mean()

        return (nested,) if lower.lowers else tuple(term(draw) for draw in draws[lower.name])


class Frozen(Nesting):
    """One response per level below, lowest first, with every level in between a constant.

    The inputs of a response are the responses of the level's own lowers, as separate inputs, and the variables of the
    level whose hypergradient is taken. This is the sum over all downward paths of the program, with one response
    evaluation per level and no second derivative through a response; an approximation (Choe et al., Betty, ICLR 2023).
    """

    def respond(self, level: Level, live: Mapping[str, Params], draws: Draws) -> dict[str, Params]:
        """Lowest first, so that higher ones respond to its response."""
        known = dict(live)
        for lower in self.levels.values():
            if lower.index >= level.index:
                break
            inputs = {
                name: known[name]
                for name in lower.reads
                if name in known and (name == level.name or self.levels[name].index < lower.index)
            }
            if inputs:
                known[lower.name] = self._attach(lower, inputs, self._objective(lower, inputs, draws), nested=False)
        return known

    def _objective(self, lower: Level, inputs: Mapping[str, Params], draws: Draws) -> tuple[Objective, ...]:
        sizes = [len(tensors) for tensors in inputs.values()]

        def term(draw: Draw) -> Objective:
            return lambda theta, flat: lower.pure_value(
                draw, {lower.name: theta, **dict(zip(inputs, tree.split(flat, sizes), strict=True))}
            )

        return tuple(term(draw) for draw in draws.get(lower.name, ()))
