"""The interface of a response."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from nestor.optim.history import HistorySpec
from nestor.responses.lower_level import LowerLevel
from nestor.vectors.algebra import Params


class Response(ABC):
    r"""How the levels above differentiate through the best response :math:`\theta^*(\lambda)` of a level.

    A frozen dataclass whose fields are the options; it keeps no state.
    """

    differentiable: ClassVar[bool] = True
    """Whether anything comes through at all: an upper level that has no other gradient needs it."""

    @property
    def assumes_stationarity(self) -> bool:
        """Whether the response is exact only where the gradient of the level vanishes."""
        return False

    @property
    def history_spec(self) -> HistorySpec | None:
        """What is kept of the level's steps; None if nothing."""
        return None

    def take_planned_steps(self, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Go to the point at which the response is taken, if steps of the level are planned.

        By default, only a level that starts from a level above (``Problem(init=...)``) takes its planned steps.

        Args:
            lower: The level.
            theta: Its present variables.
            inputs: The tensors of the levels above.

        Returns:
            The level, as ``pull_back`` will see it, and its best response.
        """
        if lower.init_indices is None or lower.trajectory is None or not lower.trajectory.history.planned:
            return lower, theta
        trajectory, state = lower.trajectory.taken(inputs)
        return replace(lower, trajectory=trajectory), state.params

    @abstractmethod
    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        r"""Map a cotangent on the best response to cotangents on its inputs, :math:`(d\theta^*/d\lambda)^T c`.

        If gradients are enabled when this is called, the result is differentiable again, in all three arguments.

        Args:
            lower: The level.
            theta: Its best response; each tensor any shape.
            inputs: The tensors of the levels above that it responds to.
            cotangent: ``c``, a vector like ``theta``.

        Returns:
            A vector like ``inputs``; None for a tensor that the level does not respond to.
        """

    @abstractmethod
    def describe(self) -> str:
        """Name the method and its options in a few words, for tables."""

    def for_counting(self, dimension: int) -> Response:
        """Return a method that does the evaluations of this one for a level of ``dimension``, on a level of any size.

        ``explain()`` runs it on a miniature of the program. Only a method whose work depends on the numbers needs its
        own.
        """
        return self
