"""The cross derivative by forward over reverse."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.attention import attention_math_kernel
from nestor.autodiff.counters import count_gradient
from nestor.autodiff.forward_mode import DualMode, dual, load_rules, tangent
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.implicit.cross.reverse_mode import ReverseMode
from nestor.responses.lower_level import LowerLevel, differentiate
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

# Levels that were told that they use reverse mode instead: once is enough.
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True, kw_only=True)
class ForwardMode(CrossDerivative):
    r"""Evaluate the gradient at the dual numbers :math:`\theta + \varepsilon v`: its tangent is the cross derivative.

    .. math:: \nabla_\lambda G(\theta + \varepsilon v, \lambda)
        = \nabla_\lambda G + \varepsilon\, \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v

    Exact: no step size, one set of random numbers, and ``detach()`` means what it says. One forward and one gradient,
    with less memory than a double backward. Falls back to :class:`ReverseMode`, with a warning the first time, for an
    operator that has no forward-mode rule and for an objective that contains best responses; and without one where the
    result has to be differentiated again.

    Reference: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by forward over reverse; see :class:`CrossDerivative`."""
        if torch.is_grad_enabled():
            return ReverseMode().product(lower, theta, inputs, vector)
        if lower.nested:
            _tell(lower.name, "its objective contains best responses, which have no forward-mode rule")
            return ReverseMode().product(lower, theta, inputs, vector)
        try:
            return self._tangents(lower, theta, inputs, vector)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            _tell(lower.name, str(error).split(" because")[0])
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            # The loss differentiates in its variables itself.
        return ReverseMode().product(lower, theta, inputs, vector)

    def _tangents(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        load_rules()
        total: list[Tensor | None] = [None] * len(inputs)
        for term in lower.terms:
            with torch.enable_grad(), forward_ad.dual_level(), attention_math_kernel():
                duals = [dual(t.detach(), v) for t, v in zip(theta, vector, strict=True)]
                leaves = algebra.leaves(inputs)
                count_gradient(lower.name)
                with DualMode():
                    value = term(duals, leaves)
                if not value.requires_grad:
                    continue  # without a graph in the variables: it does not depend on the inputs
                grads = differentiate(value, leaves, lower.loss_scale)
                tangents = [None if g is None else tangent(g) for g in grads]
            total = algebra.accumulate(total, tangents, 1 / len(lower.terms))
        return total


def _tell(level: str, reason: str) -> None:
    if (level, reason) not in _told:
        _told.add((level, reason))
        warnings.warn(
            f"Level {level!r}: the cross derivative is computed by ReverseMode, not ForwardMode ({reason}). The result "
            "is the same; say cross=ReverseMode() to silence this.",
            stacklevel=2,
        )
