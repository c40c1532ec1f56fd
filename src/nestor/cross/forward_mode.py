"""The cross derivative by forward over reverse."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor import tree
from nestor.cross.cross_derivative import CrossDerivative
from nestor.cross.reverse_mode import ReverseMode
from nestor.evaluations import count_gradient
from nestor.higher_order import twice_differentiable
from nestor.lower_level import LowerLevel, differentiate
from nestor.tree import Params

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
            with torch.enable_grad(), forward_ad.dual_level(), twice_differentiable():
                duals = [dual(t.detach(), v) for t, v in zip(theta, vector, strict=True)]
                leaves = tree.leaves(inputs)
                count_gradient(lower.name)
                with _Moving():
                    value = term(duals, leaves)
                if not value.requires_grad:
                    continue  # without a graph in the variables: it does not depend on the inputs
                grads = differentiate(value, leaves, lower.loss_scale)
                tangents = [None if g is None else tangent(g) for g in grads]
            total = tree.accumulate(total, tangents, 1 / len(lower.terms))
        return total


class _Moving(TorchFunctionMode):
    """Lets numbers that carry tangents pass for tensors that require gradients, without the memory of a graph.

    ``torch.no_grad()`` inside a loss stops tangents, as it stops gradients; ``requires_grad``, by which losses choose
    what they decay, is true; and a product with a matrix is one product, as it is with a matrix that requires gradients
    (torch repeats one that does not for every row of a batch that is not contiguous: six times as slow).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        elif func == REQUIRES_GRAD:
            return func(*args) or forward_ad.unpack_dual(args[0]).tangent is not None  # type: ignore[no-untyped-call]
        elif func in _PRODUCTS:
            dense: dict[int, Tensor] = {}  # attention looks whether two of its arguments are one
            args = tuple(dense.setdefault(id(a), a.contiguous()) if _is_batch(a) else a for a in args)
        return func(*args, **(kwargs or {}))


def _is_batch(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() > 2


_PRODUCTS = (F.linear, F.multi_head_attention_forward)
# Reads a tensor's requires_grad.
REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


@functools.cache
def load_rules() -> None:
    """Let torch load its forward-mode rules, which warn of torch's own deprecations, before anything is computed."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        dual(torch.zeros(()), torch.zeros(()))


def dual(primal: Tensor, direction: Tensor) -> Tensor:
    """Make a dual number."""
    made: Tensor = forward_ad.make_dual(primal, direction)  # type: ignore[no-untyped-call]
    return made


def tangent(number: Tensor) -> Tensor:
    """Read the tangent of a number, zero if it is not dual."""
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(number) if found is None else found.detach()


def primal(number: Tensor) -> Tensor:
    """Read the value of a number without its tangent."""
    found: Tensor = forward_ad.unpack_dual(number).primal  # type: ignore[no-untyped-call]
    return found.detach()


def _tell(level: str, reason: str) -> None:
    if (level, reason) not in _told:
        _told.add((level, reason))
        warnings.warn(
            f"Level {level!r}: the cross derivative is computed by ReverseMode, not ForwardMode ({reason}). The result "
            "is the same; say cross=ReverseMode() to silence this.",
            stacklevel=2,
        )
