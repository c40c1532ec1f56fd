"""What a cross derivative is."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from nestor.optim.history_spec import HistorySpec
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.vectors import Params


class CrossDerivative(ABC):
    r"""Compute :math:`\frac{\partial^2 G}{\partial\lambda\,\partial\theta} v` for a lower objective ``G``.

    Example:
        >>> class Doubled(nestor.CrossDerivative):
        ...     def product(self, lower, theta, inputs, vector):
        ...         exact = nestor.ReverseMode().product(lower, theta, inputs, vector)
        ...         return [None if p is None else 2 * p for p in exact]
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(solver=nestor.DenseSolve(), cross=Doubled())
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta, weight)
        (tensor(2.),)
    """

    work: ClassVar[Work] = Work()
    """The evaluations of one product."""
    differentiates_twice: ClassVar[bool] = True
    """Whether second derivatives of ``G`` are computed; False if gradients are differenced."""
    tolerance: ClassVar[float] = 0.0
    """The relative error of a hypergradient above which a run warns of differences."""

    @property
    def history_spec(self) -> HistorySpec | None:
        """The part of the level's history that the derivative needs; None if none."""
        return None

    @abstractmethod
    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply the mixed derivative at ``(theta, inputs)`` onto ``vector``.

        The result is differentiable again if gradients are enabled when this is called (``torch.is_grad_enabled()``).

        Args:
            lower: The level.
            theta: Its variables.
            inputs: The tensors of the levels above.
            vector: A vector like ``theta``; with ``lower.may_overwrite``, a list may be emptied.

        Returns:
            A vector like ``inputs``; None for a tensor that the objective does not depend on.
        """
