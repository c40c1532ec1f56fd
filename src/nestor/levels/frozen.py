"""Frozen nesting: one response a level, with every level in between a constant."""

from __future__ import annotations

from collections.abc import Sequence

from nestor.data.draw import Draw
from nestor.levels.level import Level
from nestor.levels.nesting import LowerNode, Nesting, constants_of
from nestor.optim.history import Buffers, Histories
from nestor.responses.lower_objective import Term


class Frozen(Nesting):
    """One response per level below, lowest first, with every level in between a constant.

    The inputs of a response are the responses of the level's own lowers, as separate inputs, and the variables of the
    level whose hypergradient is taken. This is the sum over all downward paths of the program, with one response
    evaluation per level and no second derivative through a response; an approximation (Choe et al., Betty, ICLR 2023).
    """

    name = "frozen"
    nested = False

    def _order(self, level: Level, differentiable: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]:
        """Lowest first: higher ones respond to its response."""
        known = set(differentiable)
        order = []
        for lower in (self.levels[name] for name in self.below(level.name)[:-1]):
            inputs = tuple(
                name
                for name in lower.links.dependencies
                if name in known and (name == level.name or self.levels[name].index < lower.index)
            )
            if inputs:
                known.add(lower.name)
                order.append((lower, inputs))
        return order

    def _terms(
        self, node: LowerNode, draws: Sequence[Draw], below: Histories, buffers: Sequence[Buffers]
    ) -> tuple[Term, ...]:
        """One term a batch; all other levels are constants."""
        return self._loss_terms(node, draws, buffers, constants_of(below))
