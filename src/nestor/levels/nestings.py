"""The two nestings: exact and frozen."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nestor.autodiff.objective import Term
from nestor.data.draws import Draw
from nestor.levels.level import Level
from nestor.levels.nesting import LowerNode, Nesting, constants_of
from nestor.optim.history import Buffers, Histories
from nestor.vectors import Params


class Exact(Nesting):
    r"""The objective of every level contains the best responses of its lowers.

    .. math:: \text{objective}_k(\theta_k, \text{uppers}) = \text{loss}_k(\theta_k, \text{uppers},
        \{\theta_l^*(\theta_k, \text{uppers})\}_{l \in \text{lowers}(k)})

    The curvature of a level in the middle therefore contains the responses of the levels below it.
    """

    name = "exact"
    nested = True

    def _order(self, level: Level, differentiable: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]:
        """List the highest level first: the levels below it respond to its response."""
        known = set(differentiable)
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
        node: LowerNode,
        draws: Sequence[Draw],
        below: Histories,
        buffers: Sequence[Buffers],
        held: Mapping[str, Params],
    ) -> tuple[Term, ...]:
        """Return one term for all batches: the batches share the responses."""

        def nested(theta: Params, inputs: Params) -> Tensor:
            tensors = {node.level.name: theta, **node.layout.by_level(inputs)}
            known = {**held, **constants_of(below), **self.attach(node.level, tensors, below, held)}
            noted: Sequence[Buffers | None] = buffers or [None] * len(draws)
            pairs = zip(draws, noted, strict=True)
            values = [node.level.loss.pure_value(draw, known, held) for draw, held in pairs]
            return values[0] if len(values) == 1 else torch.stack(values).mean()

        return (nested,)


class Frozen(Nesting):
    """The hypergradient contains one response of each level below; in a response, the levels in between are constants.

    The inputs of a response are the responses of the level's own lowers, as separate inputs, and the variables of the
    level whose hypergradient is computed. The result is the sum over all downward paths of the program. It needs one
    response for each level, and no second derivative through a response. It is an approximation (Choe et al., Betty,
    ICLR 2023).
    """

    name = "frozen"
    nested = False

    def _order(self, level: Level, differentiable: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]:
        """List the lowest level first: the levels above it respond to its response."""
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
        self,
        node: LowerNode,
        draws: Sequence[Draw],
        below: Histories,
        buffers: Sequence[Buffers],
        held: Mapping[str, Params],
    ) -> tuple[Term, ...]:
        """Return one term for each batch; all other levels are constants."""
        return self._loss_terms(node, draws, buffers, {**held, **constants_of(below)})
