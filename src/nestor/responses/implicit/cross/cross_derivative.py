"""The interface of a cross derivative."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from nestor.optim.history import HistorySpec
from nestor.responses.lower_level import LowerLevel
from nestor.vectors.algebra import Params


class CrossDerivative(ABC):
    r"""Compute :math:`\frac{\partial^2 G}{\partial\lambda\,\partial\theta} v` for a lower objective ``G``."""

    @property
    def history_spec(self) -> HistorySpec | None:
        """What has to be noted of the level's past; None if nothing."""
        return None

    @abstractmethod
    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply the mixed derivative at ``(theta, inputs)`` onto ``vector``.

        The result is differentiable again if gradients are enabled when this is called (``torch.is_grad_enabled()``).

        Args:
            lower: The level.
            theta: Its variables.
            inputs: The tensors of the levels above.
            vector: A vector like ``theta``; with ``lower.may_overwrite``, a list comes back empty.

        Returns:
            A vector like ``inputs``; None for a tensor that the objective does not depend on.
        """
