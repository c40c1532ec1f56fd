"""The objective of a lower level, as a function of its variables and the tensors of the levels above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.counters import count_gradient
from nestor.autodiff.grad import scaled_grad
from nestor.autodiff.scope import Scope, in_scope
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

Term: TypeAlias = Callable[[Params, Params], Tensor]
"""Maps a level's variables and the tensors of the levels above to a scalar."""


@dataclass(frozen=True)
class LowerObjective:
    r"""The function ``objective(theta, inputs)``: the mean of its ``terms``.

    An evaluation leaves no trace. The same arguments give the same value, random numbers included. No parameter,
    buffer or generator changes.

    Args:
        name: Name of the level, for counters and errors.
        terms: One function a micro-batch of the level's last step.
        nested: Whether the objective contains best responses of further levels, which have no forward-mode rule.
        loss_scale: The factor by which gradients of the losses are scaled on their way (fp16); None is one.
    """

    name: str
    terms: tuple[Term, ...]
    nested: bool = False
    loss_scale: Tensor | None = None

    def __call__(self, theta: Params, inputs: Params) -> Tensor:
        """Evaluate the mean of the terms, in the present scope."""
        values = [term(theta, inputs) for term in self.terms]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def gradient(self, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        """Differentiate the objective with respect to ``wrt``, some of ``theta`` and ``inputs``.

        With ``create_graph`` the evaluation belongs to the scope around it, in which its graph is differentiated again.

        Returns:
            A vector like ``wrt``; None for a tensor that the objective does not depend on.
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
        self, term: Term, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool
    ) -> list[Tensor | None]:
        if create_graph and in_scope():
            return self._gradient(term(theta, inputs), wrt, create_graph=True)
        with Scope(twice=create_graph):
            return self._gradient(term(theta, inputs), wrt, create_graph=create_graph)

    def _gradient(self, value: Tensor, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        count_gradient(self.name)
        return scaled_grad(value, wrt, self.loss_scale, create_graph=create_graph)
