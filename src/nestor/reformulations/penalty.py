"""Value-function penalties: F2SA and PBGD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nestor.problem import Problem
from nestor.reformulations.reformulation import Pair, Paired, Reformulated, Reformulation, duplicate


@dataclass(frozen=True, kw_only=True)
class ValuePenalty(Reformulation):
    r"""Penalise the lower level's distance from its minimum by a multiplier that grows.

    .. math:: \theta \approx \arg\min_\theta \tfrac1\gamma F(\lambda, \theta) + G(\lambda, \theta), \qquad
        z \approx \arg\min_z G(\lambda, z), \qquad
        \frac{d}{d\lambda} \approx \nabla_\lambda F(\lambda, \theta)
        + \gamma \big(\nabla_\lambda G(\lambda, \theta) - \nabla_\lambda G(\lambda, z)\big)

    The error of the hypergradient is of order :math:`1/\gamma`. The level's own module holds ``theta``; ``z`` is a
    copy, the level ``<name>_value``. Both take the level's own optimizer and ``unroll_steps`` steps between two upper
    steps, warm-started. First derivatives only, twice the memory of the lower level.

    Args:
        multiplier: :math:`\gamma` at the first upper step.
        growth: Added to it after every upper step.
        most: Largest multiplier.
        scaled: Whether the lower level minimises ``F / gamma + G``, so that its learning rate keeps its meaning as the
            multiplier grows (F2SA), or ``F + gamma G``, and the copy ``gamma G`` (PBGD).

    Raises:
        ValueError: If a number is out of range.
    """

    multiplier: float = 1.0
    growth: float = 0.1
    most: float = 1e4
    scaled: bool = True

    def __post_init__(self) -> None:
        if not (self.multiplier > 0 and math.isfinite(self.multiplier)):
            raise ValueError(f"multiplier={self.multiplier} must be positive and finite.")
        if not (self.growth >= 0 and math.isfinite(self.growth)):
            raise ValueError(f"growth={self.growth} must be a finite number >= 0.")
        if not self.most >= self.multiplier:
            raise ValueError(f"most={self.most} must be at least multiplier={self.multiplier}.")

    def at(self, step: int) -> float:
        """Return the multiplier after ``step`` upper steps."""
        return min(self.multiplier + self.growth * step, self.most)

    def rewrite(self, name: str, lower: Problem, upper_name: str, upper: Problem, pair: Pair) -> dict[str, Problem]:
        """Two lower copies and an upper loss with the difference of their values."""
        value = f"{name}_value"

        def penalized(batch: Any, modules: Mapping[str, Any]) -> Tensor:
            outer, inner = pair.evaluate_outer(batch, modules), pair.evaluate_inner(batch, modules)
            multiplier: float = batch[2]
            return outer / multiplier + inner if self.scaled else outer + multiplier * inner

        def difference(batch: Any, modules: Mapping[str, Any]) -> dict[str, Tensor]:
            outer = pair.evaluate_outer(batch, modules)
            gap = pair.evaluate_inner(batch, modules) - pair.evaluate_inner(batch, modules, value)
            return {"loss": outer + batch[2] * gap, "upper": outer, "gap": gap, "multiplier": batch[2]}

        response = Reformulated(by=self)
        data = Paired(lower.data, upper.data, self.at, lower.unroll_steps * lower.accumulate)
        return {
            value: duplicate(
                lower,
                loss=pair.inner_of(value, scaled=not self.scaled),
                data=lower.data if self.scaled else data,
                response=response,
                reformulation=None,
            ),
            name: replace(
                lower,
                loss=pair.loss(penalized),
                data=data,
                response=response,
                reformulation=None,
            ),
            upper_name: replace(
                upper,
                loss=pair.loss(difference, value),
                data=Paired(lower.data, upper.data, self.at, upper.accumulate),
            ),
        }

    def describe(self) -> str:
        """Name the method and its multiplier."""
        grows = f" + {self.growth:g} a step" if self.growth else ""
        return f"{'F2SA' if self.scaled else 'PBGD'}(multiplier={self.multiplier:g}{grows})"


def F2SA(*, multiplier: float = 1.0, growth: float = 0.1, most: float = 1e4) -> ValuePenalty:
    r"""F2SA: a fully first-order method with two lower copies and a multiplier that grows.

    See :class:`ValuePenalty` for the formula and the arguments.

    Reference: Kwon, Kwon, Wright, Nowak, A fully first-order method for stochastic bilevel optimization, ICML 2023.
    """
    return ValuePenalty(multiplier=multiplier, growth=growth, most=most)


def PBGD(*, multiplier: float = 10.0) -> ValuePenalty:
    r"""V-PBGD: the penalty with a constant multiplier, the lower level on ``F + gamma G``.

    The lower learning rate has to be small against :math:`1/\gamma`. See :class:`ValuePenalty`.

    Reference: Shen and Chen, On penalty-based bilevel gradient descent method, ICML 2023, algorithm 1.
    """
    return ValuePenalty(multiplier=multiplier, growth=0.0, most=multiplier, scaled=False)
