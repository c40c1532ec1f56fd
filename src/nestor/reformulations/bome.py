"""BOME: the value-function constraint by a dynamic barrier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestor.problem import Problem
from nestor.reformulations.reformulation import Pair, Paired, Reformulated, Reformulation, duplicate
from nestor.vectors import algebra
from nestor.vectors.space import LOCAL


@dataclass(frozen=True, kw_only=True)
class BOME(Reformulation):
    r"""Descend on ``F`` as far as the lower level's constraint lets: a multiplier from the gradients themselves.

    .. math:: q(\lambda, \theta) = G(\lambda, \theta) - G(\lambda, \theta_T), \qquad
        (\lambda, \theta) \leftarrow (\lambda, \theta) - \xi (\nabla F + \gamma \nabla q), \qquad
        \gamma = \max\Big(0, \eta - \frac{\langle\nabla F, \nabla q\rangle}{\lVert\nabla q\rVert^2}\Big)

    :math:`\theta_T` is a copy, the level ``<name>_value``: it starts from :math:`\theta` and takes the level's
    ``unroll_steps`` steps on ``G``. Then :math:`\theta` takes one step, and the upper level one, each with its own
    optimizer and with :math:`\gamma` from the gradients at that point. With constant learning rates it ends near the
    optimum, not at it (on a small quadratic 9 % off, less with smaller rates). First derivatives only; two more
    gradients a step for :math:`\gamma`.

    Args:
        eta: :math:`\eta`, how fast the constraint is to be approached.

    Raises:
        ValueError: If ``eta`` is not positive.

    Reference: Liu, Ye, Wright, Stone, Liu, BOME! Bilevel optimization made easy, NeurIPS 2022, equations 6 and 7.
    """

    eta: float = 0.5

    def __post_init__(self) -> None:
        if not (self.eta > 0 and math.isfinite(self.eta)):
            raise ValueError(f"BOME(eta={self.eta}) must be positive and finite.")

    def rewrite(self, name: str, lower: Problem, upper_name: str, upper: Problem, pair: Pair) -> dict[str, Problem]:
        """A copy that goes ahead, and one loss for both levels."""
        value = f"{name}_value"

        def barrier(batch: Any, modules: Mapping[str, Any]) -> dict[str, Tensor]:
            outer = pair.evaluate_outer(batch, modules)
            gap = pair.evaluate_inner(batch, modules) - pair.evaluate_inner(batch, modules, value)
            joint = [p for level in (name, upper_name) for p in modules[level].parameters() if p.requires_grad]
            multiplier = self.multiplier(outer, gap, joint)
            return {"loss": outer + multiplier * gap, "upper": outer, "gap": gap, "multiplier": multiplier}

        response = Reformulated(by=self)
        loss = pair.loss(barrier, value, upper_name)
        return {
            value: duplicate(lower, loss=pair.inner_of(value), response=response, reformulation=None, init=name),
            name: replace(
                lower,
                loss=loss,
                data=Paired(lower.data, upper.data, _none),
                response=response,
                reformulation=None,
                unroll_steps=1,
            ),
            upper_name: replace(upper, loss=loss, data=Paired(lower.data, upper.data, _none)),
        }

    def multiplier(self, outer: Tensor, gap: Tensor, joint: list[Tensor]) -> Tensor:
        """Compute the multiplier from the two gradients; a constant."""
        if not torch.is_grad_enabled():
            return torch.zeros_like(outer)
        down, constraint = (
            algebra.zeros_for_none(torch.autograd.grad(f, joint, retain_graph=True, allow_unused=True), joint)
            for f in (outer, gap)
        )
        square = LOCAL.dot(constraint, constraint)
        ratio = LOCAL.dot(down, constraint) / torch.where(square == 0, 1.0, square)
        return torch.where(square == 0, 0.0, torch.clamp(self.eta - ratio, min=0.0)).detach()

    def describe(self) -> str:
        """Name the method."""
        return f"BOME(eta={self.eta:g})"


def _none(step: int) -> float:
    return 0.0
