"""What a response knows of the level that it differentiates through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.attention import attention_math_kernel
from nestor.autodiff.counters import count_gradient
from nestor.autodiff.grad import grad
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

if TYPE_CHECKING:
    from nestor.responses.unrolling.trajectory import Trajectory
    from nestor.solvers import SolveState

Objective: TypeAlias = Callable[[Params, Params], Tensor]


@dataclass(frozen=True)
class LowerLevel:
    r"""A level as a function: ``objective(theta, inputs)``, the mean of its ``terms``.

    Evaluating it leaves no trace: the same arguments give the same value, random numbers included, and no parameter,
    buffer or generator changes.

    Args:
        name: Name of the level, for counters and errors.
        terms: One objective a micro-batch of the level's last step; each maps the level's variables and the tensors of
            the levels above to a scalar.
        nested: Whether the objective contains best responses of further levels, which have no forward-mode rule.
        trajectory: The steps that led to its variables, or that it is about to take; None if they are not known.
        start: The inputs that its variables started from, if any (``Problem(init=...)``).
        solve: What is kept from one linear solve to the next; None keeps nothing.
        loss_scale: The factor by which gradients of its losses are scaled on their way (fp16); None is one.
        once: Whether its response is evaluated at this point by one level, once, and may use up the cotangent and the
            gradients that were kept of its steps.
    """

    name: str
    terms: tuple[Objective, ...]
    nested: bool = False
    trajectory: Trajectory | None = None
    start: Sequence[int] | None = None
    solve: SolveState | None = None
    loss_scale: Tensor | None = None
    once: bool = False

    def objective(self, theta: Params, inputs: Params) -> Tensor:
        """Evaluate the mean of the terms, with kernels that can be differentiated twice."""
        with attention_math_kernel():
            values = [term(theta, inputs) for term in self.terms]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def gradient(self, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        """Differentiate the objective with respect to ``wrt``, some of ``theta`` and ``inputs``.

        None stands for a tensor that the objective does not depend on.
        """
        # One micro-batch at a time: without a graph to keep, the memory of one.
        if len(self.terms) == 1:
            return self._partial(self.terms[0], theta, inputs, wrt, create_graph=create_graph)
        total: list[Tensor | None] = [None] * len(wrt)
        for term in self.terms:
            grads = self._partial(term, theta, inputs, wrt, create_graph=create_graph)
            total = algebra.accumulate(total, grads, 1 / len(self.terms))
        return total

    def _partial(
        self, term: Objective, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool
    ) -> list[Tensor | None]:
        if create_graph:
            with attention_math_kernel():
                value = term(theta, inputs)
        else:
            value = term(theta, inputs)
        count_gradient(self.name)
        return differentiate(value, wrt, self.loss_scale, create_graph=create_graph)


def differentiate(
    value: Tensor, wrt: Params, loss_scale: Tensor | None, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Take the gradient of a scalar, scaled up on its way by ``loss_scale``; None stands for zero."""
    if loss_scale is None:
        return grad([value], wrt, create_graph=create_graph)
    grads = grad([value * loss_scale], wrt, create_graph=create_graph)
    return [None if g is None else g / loss_scale for g in grads]


def pull_back(
    outputs: Sequence[Tensor | None],
    wrt: Params,
    vector: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Multiply the transposed Jacobian of ``outputs`` in ``wrt`` onto ``vector``, by one reverse pass.

    None stands for zero: for an output without a graph, in the vector, and for a tensor that no output depends on.
    """
    pairs = [
        (o, v) for o, v in zip(outputs, vector, strict=True) if o is not None and v is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(wrt)
    return grad([o for o, _ in pairs], wrt, [v for _, v in pairs], create_graph=create_graph, retain_graph=retain_graph)
