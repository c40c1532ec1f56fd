"""The interface of an optimality condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from nestor.lower_level import LowerLevel
from nestor.tree import Params


class Condition(ABC):
    r"""A residual ``r(theta, inputs)`` that vanishes at the best response.

    The implicit function theorem then gives :math:`d\theta^*/d\lambda = -(\partial r/\partial\theta)^{-1}
    \partial r/\partial\lambda`.
    """

    symmetric: ClassVar[bool]
    """Whether :math:`A = \\partial r/\\partial\\theta` is a symmetric matrix."""

    @abstractmethod
    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate ``r(theta, inputs)`` with a graph to both arguments; shapes of ``theta``."""
