"""A condition, linearized at a point: one graph that serves a solver's products and the mixed product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from nestor import tree
from nestor.conditions.condition import Condition
from nestor.evaluations import count_hvp
from nestor.lower_level import LowerLevel
from nestor.solvers.linear_operator import LinearOperator
from nestor.tree import Params


class Linearization(LinearOperator):
    r"""The matrices :math:`A^T + \delta I` and :math:`B^T` of a residual ``r(theta, inputs)`` at a point.

    .. math:: A = \frac{\partial r}{\partial\theta}, \qquad B = \frac{\partial r}{\partial\lambda}

    The residual is evaluated once, with a graph, at the first product; every product is one reverse pass through it.

    Args:
        condition: Its residual is linearized.
        lower: The level.
        theta: Point, the level's variables.
        inputs: Point, the tensors of the levels above.
        damping: ``delta`` in ``A + delta I``; units of the Hessian's eigenvalues.
    """

    def __init__(
        self, condition: Condition, lower: LowerLevel, theta: Params, inputs: Params, damping: float = 0.0
    ) -> None:
        self.condition = condition
        self.lower = lower
        self.damping = damping
        self.symmetric = condition.symmetric
        self._point = theta, inputs

    @cached_property
    def _theta(self) -> list[Tensor]:
        return tree.leaves(self._point[0])

    @cached_property
    def _inputs(self) -> list[Tensor]:
        return tree.leaves(self._point[1])

    @cached_property
    def _residual(self) -> list[Tensor]:
        with torch.enable_grad():
            return self.condition.residual(self.lower, self._theta, self._inputs)

    @property
    def like(self) -> Params:
        """Vectors that the operator acts on look like the level's variables."""
        return self._theta

    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply ``(A^T + damping I)`` onto ``vector``."""
        count_hvp(self.lower.name)
        product = self._pull_back(self._theta, vector, retain_graph=True)
        return tree.axpy(self.damping, vector, product) if self.damping else product

    def pull_back(self, vector: Params) -> list[Tensor]:
        """Multiply ``B^T`` onto ``vector``: the cotangent on the inputs. Frees the graph."""
        return self._pull_back(self._inputs, vector, retain_graph=False)

    def _pull_back(self, wrt: Params, vector: Params, *, retain_graph: bool) -> list[Tensor]:
        # An objective that is linear in theta has a residual without a graph: its derivatives are zero.
        pairs = [(r, v) for r, v in zip(self._residual, vector, strict=True) if r.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in wrt]
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            [r for r, _ in pairs], wrt, [v for _, v in pairs], retain_graph=retain_graph, allow_unused=True
        )
        return tree.zeros_for_none(grads, wrt)
