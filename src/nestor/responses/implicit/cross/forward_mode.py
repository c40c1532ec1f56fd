"""The cross derivative by dual numbers: reverse over forward, or forward over reverse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.custom_functions import custom_nodes
from nestor.autodiff.derivatives import is_final, reason_of
from nestor.autodiff.forward_mode import DualMode, dual, dual_gradient, has_tangent, load_rules, tangent
from nestor.autodiff.grad import accumulate, grad, scaled_grad
from nestor.autodiff.instruments import count_gradient, is_tracing, note_method
from nestor.autodiff.objective import Term
from nestor.autodiff.scope import Scope
from nestor.autodiff.slope import SlopeMode
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.implicit.cross.reverse_mode import ReverseMode
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra

_SEPARATE, _FORWARD, _REVERSE = "reverse over forward", "cross=ForwardMode()", "cross=ReverseMode()"

Found: TypeAlias = tuple[list[Tensor | None], bool]
"""A product, and whether the graph of the objective contains custom Functions, if it is not known."""


@dataclass(frozen=True, kw_only=True)
class ForwardMode(CrossDerivative):
    r"""Evaluate the objective at the dual numbers :math:`\theta + \varepsilon v`.

    .. math:: G(\theta + \varepsilon v, \lambda)
        = G + \varepsilon\, \langle \nabla_\theta G, v \rangle, \qquad
        \nabla_\lambda G(\theta + \varepsilon v, \lambda)
        = \nabla_\lambda G + \varepsilon\, \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v

    Exact: no step size, one set of random numbers, and ``detach()`` is respected. It needs one forward with tangents
    and one reverse pass from the value to the inputs, and less memory than a double backward. Two orders give the same:

    - *Reverse over forward* (the first formula): the tangent of the value is differentiated with respect to the inputs,
      by an ordinary reverse pass through what depends on them. It is used where the variables and the inputs meet only
      in operations whose tangents are differentiable (sums, products, linear layers, elementwise functions): weights
      of samples, penalties, losses of a linear head.
    - *Forward over reverse* (the second formula): the gradient with respect to the inputs has a tangent. It is used
      elsewhere, for instance where the inputs change the data of a network that ends in a softmax.

    Which order is used depends only on the operations of the loss. Where both fail or find no derivative (an operation
    without a forward-mode rule, an objective that contains best responses), :class:`ReverseMode` replaces them, with
    one warning for each level. If the result has to be differentiated again, :class:`ReverseMode` is used without a
    warning.

    References: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994. Griewank, Walther,
    Evaluating Derivatives, 2nd edition, 2008, section 5 (second-order adjoints).

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(solver=nestor.DenseSolve(), cross=nestor.ForwardMode())
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta, weight)
        (tensor(1.),)
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by one of the two orders; see :class:`CrossDerivative`."""
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

    def _tangents(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> Found:
        lower.objective.check_twice()
        known = lower.objective.derivatives
        if not known.lack(_SEPARATE):
            try:
                found = reverse_over_forward(lower, theta, inputs, vector)
                note_method(lower.objective.name, _SEPARATE)
                return found
            except Exception as error:  # torch has tangents that raise errors of all kinds when they are differentiated
                if is_final(error):
                    raise
                known.note(_SEPARATE)
        note_method(lower.objective.name, "forward over reverse")
        return forward_over_reverse(lower, theta, inputs, vector)


def reverse_over_forward(lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> Found:
    """Differentiate the tangent of the objective with respect to the inputs.

    Raises:
        NotSeparableError: If the variables and the inputs meet in an operation that is not separable.
    """

    def product(term: Term, duals: Params, leaves: Params) -> Product | None:
        with SlopeMode() as mode:
            value = term(duals, leaves)
            slope = mode.slope(value)
        if slope is None:
            return None
        scale = lower.objective.loss_scale
        known = lower.objective.derivatives.forward_is_right or not any(custom_nodes([value, slope]))
        return (grad([slope], leaves) if scale is None else scaled_grad(slope, leaves, scale)), not known

    return _mean_of_terms(lower, theta, inputs, vector, product)


def forward_over_reverse(lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> Found:
    """Return the tangent of the objective's gradient with respect to the inputs."""

    def product(term: Term, duals: Params, leaves: Params) -> Product | None:
        with DualMode():
            value = term(duals, leaves)
            if not value.requires_grad:
                return None  # no graph: the value does not depend on the inputs
            known = lower.objective.derivatives.forward_is_right or not any(custom_nodes([value]))
            grads = dual_gradient(value, leaves, lower.objective.loss_scale)
            return [tangent(g) if g is not None and has_tangent(g) else None for g in grads], not known

    return _mean_of_terms(lower, theta, inputs, vector, product)


Product: TypeAlias = tuple[Sequence[Tensor | None], bool]


def _mean_of_terms(
    lower: LowerLevel,
    theta: Params,
    inputs: Params,
    vector: Params,
    product: Callable[[Term, Params, Params], Product | None],
) -> Found:
    """Average the products of all terms, each at dual variables; None is zero."""
    load_rules()
    terms = lower.objective.terms
    total: list[Tensor | None] = [None] * len(inputs)
    has_custom = False
    for term in terms:
        count_gradient(lower.objective.name)
        with torch.enable_grad(), forward_ad.dual_level(), Scope(twice=True):
            duals = [dual(t.detach(), v) for t, v in zip(theta, vector, strict=True)]
            found = product(term, duals, algebra.leaves(inputs))
        if found is not None:
            total = accumulate(total, found[0], 1 / len(terms))
            has_custom |= found[1]
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
