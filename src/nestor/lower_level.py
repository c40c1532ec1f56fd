"""What a response knows of the level that it differentiates through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nestor import tree
from nestor.evaluations import count_gradient
from nestor.higher_order import twice_differentiable
from nestor.tree import Params

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
    """

    name: str
    terms: tuple[Objective, ...]
    nested: bool = False

    def objective(self, theta: Params, inputs: Params) -> Tensor:
        """Evaluate the mean of the terms, with kernels that can be differentiated twice."""
        with twice_differentiable():
            values = [term(theta, inputs) for term in self.terms]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def gradient(self, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool) -> list[Tensor]:
        """Differentiate the objective with respect to ``wrt``, some of ``theta`` and ``inputs``."""
        if create_graph:
            return self._partial(self.objective(theta, inputs), wrt, create_graph=True)
        # One micro-batch at a time: the memory of one graph.
        total: list[Tensor | None] = [None] * len(wrt)
        for term in self.terms:
            grads = self._partial(term(theta, inputs), wrt, create_graph=False)
            total = tree.accumulate(total, grads, 1 / len(self.terms))
        return tree.zeros_for_none(total, wrt)

    def _partial(self, value: Tensor, wrt: Params, *, create_graph: bool) -> list[Tensor]:
        count_gradient(self.name)
        grads: Sequence[Tensor | None] = torch.autograd.grad(value, wrt, create_graph=create_graph, allow_unused=True)
        return tree.zeros_for_none(grads, wrt)
