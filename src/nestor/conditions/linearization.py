"""A condition, linearized at a point: one graph that serves a solver's products and the mixed product."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from nestor import tree
from nestor.conditions.condition import Condition
from nestor.evaluations import count_hvp
from nestor.lower_level import LowerLevel, pull_back
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
        """Multiply ``A^T + damping I`` onto ``vector``."""
        count_hvp(self.lower.name)
        product = tree.zeros_for_none(pull_back(self._residual, self._theta, vector, retain_graph=True), vector)
        return tree.axpy(self.damping, vector, product) if self.damping else product

    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply ``A + damping I`` onto ``vector``: a second reverse pass through the first, if not symmetric."""
        if self.symmetric:
            return self.apply(vector)
        count_hvp(self.lower.name)
        probes, pulled = self._pulled
        product = tree.zeros_for_none(pull_back(pulled, probes, vector, retain_graph=True), vector)
        return tree.axpy(self.damping, vector, product) if self.damping else product

    @cached_property
    def _pulled(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """A reverse pass that is linear in its probes, with a graph: its own derivative is the forward product."""
        probes = [torch.zeros_like(t).requires_grad_() for t in self._theta]
        return probes, pull_back(self._residual, self._theta, probes, create_graph=True)

    def pull_back(self, vector: Params) -> list[Tensor | None]:
        """Multiply ``B^T`` onto ``vector``: the cotangent on the inputs. Frees the graph."""
        return pull_back(self._residual, self._inputs, vector)
