"""A condition that the user wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nestor.autodiff.attention import attention_math_kernel
from nestor.responses.implicit.conditions.condition import Condition
from nestor.responses.lower_level import LowerLevel
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class Residual(Condition):
    r"""The condition :math:`r(\theta, \lambda) = 0` for any function with as many outputs as variables.

    Args:
        function: ``function(theta, inputs)`` on flat lists, returning a vector like ``theta``.
    """

    symmetric: ClassVar[bool] = False
    function: Callable[[Params, Params], Sequence[Tensor]]

    def residual(self, lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor]:
        """Evaluate the function; the level's objective is not looked at."""
        with attention_math_kernel():
            return list(self.function(theta, inputs))
