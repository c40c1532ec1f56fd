"""Cross derivatives without a step size: by double backward, and by forward over reverse."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.forward_mode import DualMode, dual, load_rules, tangent
from nestor.autodiff.grad import accumulate, scaled_grad, vjp
from nestor.autodiff.instruments import count_gradient
from nestor.autodiff.scope import Scope, enclosed
from nestor.errors import NestorWarning
from nestor.optim.history import HistorySpec
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.vectors import Params, algebra, split


class CrossDerivative(ABC):
    r"""Compute :math:`\frac{\partial^2 G}{\partial\lambda\,\partial\theta} v` for a lower objective ``G``."""

    work: ClassVar[Work] = Work()
    """The evaluations of one product."""
    differentiates_twice: ClassVar[bool] = True
    """Whether second derivatives of ``G`` are computed; False if gradients are differenced."""

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


@dataclass(frozen=True, kw_only=True)
class ReverseMode(CrossDerivative):
    r"""Differentiate :math:`\langle \nabla_\theta G(\theta, \lambda), v \rangle` with respect to :math:`\lambda`.

    Exact. It needs one forward, one gradient with a graph, and one more reverse pass. It is the fastest method for
    small levels, every operator supports it, and it is the only one for a level whose objective contains best
    responses.
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by double backward; see :class:`CrossDerivative`."""
        create_graph = torch.is_grad_enabled()

        def mixed(tensors: list[Tensor]) -> list[Tensor | None]:
            # At leaves: the derivative is partial, although theta may be a function of the inputs.
            point, given, direction = split(tensors, [len(theta), len(inputs), len(vector)])
            gradient = lower.objective.gradient(point, given, point, create_graph=True)
            return vjp(gradient, given, direction, create_graph=create_graph)

        if create_graph:
            return enclosed(mixed, [*theta, *inputs, *vector])
        with Scope(twice=True), torch.enable_grad():
            return mixed([*algebra.leaves([*theta, *inputs]), *vector])


# The warnings that were issued: level and reason.
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True, kw_only=True)
class ForwardMode(CrossDerivative):
    r"""Evaluate the gradient at the dual numbers :math:`\theta + \varepsilon v`: its tangent is the cross derivative.

    .. math:: \nabla_\lambda G(\theta + \varepsilon v, \lambda)
        = \nabla_\lambda G + \varepsilon\, \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v

    Exact: no step size, one set of random numbers, and ``detach()`` is respected. It needs one forward and one
    gradient, and less memory than a double backward. For an operator without a forward-mode rule, and for an objective
    that contains best responses, it falls back to :class:`ReverseMode`, with a warning the first time. If the result
    has to be differentiated again, it falls back without a warning.

    Reference: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by forward over reverse; see :class:`CrossDerivative`."""
        if torch.is_grad_enabled():
            return ReverseMode().product(lower, theta, inputs, vector)
        if lower.objective.nested:
            _tell(lower.objective.name, "its objective contains best responses, which have no forward-mode rule")
            return ReverseMode().product(lower, theta, inputs, vector)
        try:
            return self._tangents(lower, theta, inputs, vector)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            _tell(lower.objective.name, str(error).split(" because")[0])
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            # The loss itself calls autograd on its variables, which do not require gradients in forward mode.
        return ReverseMode().product(lower, theta, inputs, vector)

    def _tangents(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        load_rules()
        lower.objective.check_twice()
        total: list[Tensor | None] = [None] * len(inputs)
        for term in lower.objective.terms:
            with torch.enable_grad(), forward_ad.dual_level(), Scope(twice=True):
                duals = [dual(t.detach(), v) for t, v in zip(theta, vector, strict=True)]
                leaves = algebra.leaves(inputs)
                count_gradient(lower.objective.name)
                with DualMode():
                    value = term(duals, leaves)
                if not value.requires_grad:
                    continue  # no graph: the value does not depend on the inputs
                grads = scaled_grad(value, leaves, lower.objective.loss_scale)
                tangents = [None if g is None else tangent(g) for g in grads]
            total = accumulate(total, tangents, 1 / len(lower.objective.terms))
        return total


def _tell(level: str, reason: str) -> None:
    if (level, reason) not in _told:
        _told.add((level, reason))
        warnings.warn(
            f"Level {level!r}: the cross derivative is computed by ReverseMode, not ForwardMode ({reason}). The result "
            "is the same; set cross=ReverseMode() to silence this.",
            NestorWarning,
            stacklevel=2,
        )


# Forward mode has a fixed cost of half a millisecond (torch derives some of its rules in Python, cross-entropy's among
# them) and saves a part of the second reverse pass, and the memory of the graph. Measured on one thread, batch 100:
# multilayer perceptrons of 9 k, 51 k, 177 k, 301 k, 1.1 M variables 2.0, 1.6, 1.2, 1.0, 0.74 x the time of reverse
# mode, small CNNs of 52 k and 207 k 0.5 and 0.7 x.
FORWARD_MODE_FROM = 100_000


def cheapest_exact(lower: LowerLevel, theta: Params) -> CrossDerivative:
    """Choose forward mode for a large level and reverse mode for a small or nested one."""
    return ForwardMode() if algebra.size(theta) >= FORWARD_MODE_FROM and not lower.objective.nested else ReverseMode()
