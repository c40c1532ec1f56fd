"""No indirect term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nestor.lower_level import LowerLevel
from nestor.responses.response import Response
from nestor.tree import Params


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Response):
    r"""Take :math:`d\theta^*/d\lambda = 0`: the level is a constant for the levels above, which keep their direct term.

    As in first-order MAML. An upper level whose loss does not read its own variables gets no gradient from it, which
    ``Program`` reports.

    Reference: Finn, Abbeel, Levine, Model-agnostic meta-learning, ICML 2017, section 5.2.
    """

    differentiable: ClassVar[bool] = False

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Nothing comes through."""
        return [None] * len(inputs)

    def describe(self) -> str:
        """Name the method."""
        return "FirstOrder"
