"""Cross derivatives without a step size: by double backward, and by forward over reverse."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.custom_functions import custom_nodes
from nestor.autodiff.derivatives import is_final, reason_of
from nestor.autodiff.forward_mode import DualMode, dual, dual_gradient, has_tangent, load_rules, tangent
from nestor.autodiff.grad import accumulate, vjp
from nestor.autodiff.instruments import count_gradient, is_tracing
from nestor.autodiff.scope import Scope, enclosed
from nestor.optim.history_spec import HistorySpec
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.vectors import Params, algebra, split


class CrossDerivative(ABC):
    r"""Compute :math:`\frac{\partial^2 G}{\partial\lambda\,\partial\theta} v` for a lower objective ``G``."""

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

        def mixed(point: Params, given: Params, direction: Params) -> list[Tensor | None]:
            gradient = lower.objective.gradient(point, given, point, create_graph=True)
            return vjp(gradient, given, direction, create_graph=create_graph)

        # At leaves: the derivative is partial, although theta may be a function of the inputs.
        if create_graph:
            sizes = [len(theta), len(inputs), len(vector)]
            return enclosed(lambda tensors: mixed(*split(tensors, sizes)), [*theta, *inputs, *vector])
        with Scope(twice=True), torch.enable_grad():
            return mixed(algebra.leaves(theta), algebra.leaves(inputs), vector)


_FORWARD, _REVERSE = "cross=ForwardMode()", "cross=ReverseMode()"


@dataclass(frozen=True, kw_only=True)
class ForwardMode(CrossDerivative):
    r"""Evaluate the gradient at the dual numbers :math:`\theta + \varepsilon v`: its tangent is the cross derivative.

    .. math:: \nabla_\lambda G(\theta + \varepsilon v, \lambda)
        = \nabla_\lambda G + \varepsilon\, \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v

    Exact: no step size, one set of random numbers, and ``detach()`` is respected. It needs one forward and one
    gradient, and less memory than a double backward. Where it fails or finds no derivative (an operation without a
    forward-mode rule, an objective that contains best responses), :class:`ReverseMode` replaces it, with one warning
    for each level. If the result has to be differentiated again, :class:`ReverseMode` is used without a warning.

    Reference: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by forward over reverse; see :class:`CrossDerivative`."""
        objective, known = lower.objective, lower.objective.derivatives
        if torch.is_grad_enabled() or known.lack(_FORWARD):
            return ReverseMode().product(lower, theta, inputs, vector)
        found: list[Tensor | None] | None = None
        if objective.nested:
            reason = "its objective contains best responses, which have no forward-mode rule"
        else:
            try:
                found, has_custom = self._tangents(lower, theta, inputs, vector)
            except Exception as error:
                if is_final(error):
                    raise
                reason = reason_of(error)
            else:
                reason = "its gradient has no tangent" if not algebra.present(found) else ""
                reason = reason or ("the rules of a custom Function disagree" if has_custom else "")
                if known.forward_is_right or is_tracing() or not reason:
                    known.forward_is_right = True
                    return found
        exact = ReverseMode().product(lower, theta, inputs, vector)  # if the loss itself fails, its error comes again
        if found is not None and _agree(found, exact):
            known.forward_is_right = True
        else:
            known.fall_back(objective.name, _FORWARD, _REVERSE, reason)
        return exact

    def _tangents(
        self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params
    ) -> tuple[list[Tensor | None], bool]:
        """Return the product, and whether the graph of the objective contains custom Functions, if not known."""
        load_rules()
        lower.objective.check_twice()
        total: list[Tensor | None] = [None] * len(inputs)
        has_custom = False
        for term in lower.objective.terms:
            with torch.enable_grad(), forward_ad.dual_level(), Scope(twice=True), DualMode():
                duals = [dual(t.detach(), v) for t, v in zip(theta, vector, strict=True)]
                leaves = algebra.leaves(inputs)
                count_gradient(lower.objective.name)
                value = term(duals, leaves)
                if not value.requires_grad:
                    continue  # no graph: the value does not depend on the inputs
                has_custom |= not lower.objective.derivatives.forward_is_right and any(custom_nodes([value]))
                grads = dual_gradient(value, leaves, lower.objective.loss_scale)
                tangents = [tangent(g) if g is not None and has_tangent(g) else None for g in grads]
            total = accumulate(total, tangents, 1 / len(lower.objective.terms))
        return total, has_custom


def _agree(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> bool:
    """Return whether two vectors are equal up to rounding errors; None means zero."""
    for got, wanted in zip(found, exact, strict=True):
        if wanted is None or got is None:
            if any(bool(t.any()) for t in algebra.present([got, wanted])):
                return False
        elif (got - wanted).norm() > torch.finfo(wanted.dtype).eps ** 0.5 * wanted.norm():
            return False
    return True


# Forward mode has a fixed cost of half a millisecond (torch derives some of its rules in Python, cross-entropy's among
# them) and saves a part of the second reverse pass, and the memory of the graph. Measured on one thread, batch 100:
# multilayer perceptrons of 9 k, 51 k, 177 k, 301 k, 1.1 M variables 2.0, 1.6, 1.2, 1.0, 0.74 x the time of reverse
# mode, small CNNs of 52 k and 207 k 0.5 and 0.7 x.
FORWARD_MODE_FROM = 100_000


def cheapest_exact(lower: LowerLevel, theta: Params) -> CrossDerivative:
    """Choose forward mode for a large level and reverse mode for a small or nested one."""
    return ForwardMode() if algebra.size(theta) >= FORWARD_MODE_FROM and not lower.objective.nested else ReverseMode()
