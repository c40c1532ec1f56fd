"""No indirect term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nestor.responses.lower_level import LowerLevel
from nestor.responses.response import Response
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Response):
    r"""Take :math:`d\theta^*/d\lambda = 0`: the level is a constant for the levels above, which keep their direct term.

    A level that starts from another one's variables (``Problem(init=...)``) hands its cotangent on to them as it is:
    first-order MAML. An upper level whose loss does not read its own variables gets no gradient from it, which
    ``Program`` reports.

    Reference: Finn, Abbeel, Levine, Model-agnostic meta-learning, ICML 2017, section 5.2.
    """

    differentiable: ClassVar[bool] = False

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Nothing comes through, but to the variables that the level started from."""
        grads: list[Tensor | None] = [None] * len(inputs)
        if lower.init_indices is not None:
            # Tasks that start from the same variables add up.
            for place, value in zip(lower.init_indices, cotangent, strict=True):
                grads[place] = value.sum_to_size(inputs[place].shape)
        return grads

    def describe(self) -> str:
        """Name the method."""
        return "FirstOrder"
