"""The objective of a level: a pure function of the level's variables and of the tensors of the levels above."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.derivatives import Derivatives
from nestor.autodiff.grad import Params, accumulate, grad, scaled_grad
from nestor.autodiff.instruments import count_gradient
from nestor.autodiff.scope import Scope, is_active
from nestor.errors import LossError

Term: TypeAlias = Callable[[Params, Params], Tensor]
"""Maps a level's variables and the tensors of the levels above to a scalar."""


@dataclass(frozen=True)
class Objective:
    r"""The function ``objective(theta, inputs)``: the mean of its ``terms``.

    An evaluation is pure. The same arguments give the same value, because every term replays its random numbers. No
    parameter, buffer or generator changes.

    Args:
        name: Name of the level, for counters and errors.
        terms: One function for each micro-batch of the level's last step.
        nested: Whether the objective contains best responses of other levels, which have no forward-mode rule.
        loss_scale: The factor that multiplies the losses before their reverse passes (fp16); None means 1.
        only_once: Makers of errors for a loss that cannot be differentiated twice.
        derivatives: What is known about the derivatives of the loss.
    """

    name: str
    terms: tuple[Term, ...]
    nested: bool = False
    loss_scale: Tensor | None = None
    only_once: Sequence[Callable[[], Exception]] = ()
    derivatives: Derivatives = field(default_factory=Derivatives)

    def __call__(self, theta: Params, inputs: Params) -> Tensor:
        """Evaluate the mean of the terms, in the active scope."""
        values = [term(theta, inputs) for term in self.terms]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def gradient(self, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        """Differentiate the objective with respect to ``wrt``, a subset of ``theta`` and ``inputs``.

        With ``create_graph``, the evaluation uses the active scope, in which its graph is differentiated again.

        Returns:
            A vector like ``wrt``; None for a tensor that the objective does not depend on.
        """
        # One micro-batch at a time: without create_graph, only one graph is in memory.
        differentiate = self._in_scope if create_graph and is_active() else self._in_own_scope
        if len(self.terms) == 1:
            return differentiate(self.terms[0], theta, inputs, wrt, create_graph)
        total: list[Tensor | None] = [None] * len(wrt)
        for term in self.terms:
            grads = differentiate(term, theta, inputs, wrt, create_graph)
            total = accumulate(total, grads, 1 / len(self.terms))
        return total

    def _in_own_scope(
        self, term: Term, theta: Params, inputs: Params, wrt: Params, create_graph: bool
    ) -> list[Tensor | None]:
        with Scope(twice=create_graph):
            return self._in_scope(term, theta, inputs, wrt, create_graph)

    def _in_scope(
        self, term: Term, theta: Params, inputs: Params, wrt: Params, create_graph: bool
    ) -> list[Tensor | None]:
        value = term(theta, inputs)
        if not value.requires_grad:
            raise LossError(
                "The loss has no graph to its variables, so it has no derivative. Is it computed under no_grad, "
                "detached, by operations without a derivative, or from .item() or numpy values?",
                level=self.name,
                where=self.derivatives.where or None,
            )
        count_gradient(self.name)
        if create_graph and self.only_once:
            self.check_twice()
        if self.loss_scale is None:
            return grad([value], wrt, create_graph=create_graph)
        return scaled_grad(value, wrt, self.loss_scale, create_graph=create_graph)

    def check_twice(self) -> None:
        """Raise the error of a loss that cannot be differentiated twice."""
        if self.only_once:
            raise self.only_once[0]()
