"""The cross derivative by double backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.autodiff.scope import enclosed
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.lower_level import LowerLevel
from nestor.vectors.algebra import Params
from nestor.vectors.structure import split


@dataclass(frozen=True, kw_only=True)
class ReverseMode(CrossDerivative):
    r"""Differentiate :math:`\langle \nabla_\theta G(\theta, \lambda), v \rangle` with respect to :math:`\lambda`.

    Exact. One forward, one gradient with a graph, one more reverse pass: the fastest way for small levels, the one that
    every operator supports, and the only one for a level whose objective contains best responses.
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by double backward; see :class:`CrossDerivative`."""
        create_graph = torch.is_grad_enabled()

        def mixed(tensors: list[Tensor]) -> list[Tensor | None]:
            # At leaves: the derivative is a partial one, though theta may be a function of the inputs.
            point, given, direction = split(tensors, [len(theta), len(inputs), len(vector)])
            gradient = lower.objective.gradient(point, given, point, create_graph=True)
            return vjp(gradient, given, direction, create_graph=create_graph)

        return enclosed(mixed, [*theta, *inputs, *vector])
