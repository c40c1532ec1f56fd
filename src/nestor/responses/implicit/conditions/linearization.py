"""A condition, linearized at a point: one graph for all products of a solver and for the mixed product."""

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.grad import grad, vjp
from nestor.autodiff.instruments import count_hvp
from nestor.autodiff.scope import Scope
from nestor.errors import NestorError
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, algebra

ResidualFunction: TypeAlias = Callable[[Params, Params], list[Tensor]]
"""``residual(theta, inputs)``, structured like ``theta``."""


class Linearization(LinearOperator):
    r"""The matrices :math:`A^T + \delta I` and :math:`B^T` of a residual ``r(theta, inputs)`` at a point.

    .. math:: A = \frac{\partial r}{\partial\theta}, \qquad B = \frac{\partial r}{\partial\lambda}

    The residual is evaluated once, with a graph, at the first product. Every product is one reverse pass through it.

    A caller that computes several products enters the :attr:`scope` once around all of them.

    Args:
        residual: Evaluates ``r(theta, inputs)`` with a graph to both arguments.
        symmetric: Whether ``A`` is symmetric.
        lower: The level.
        theta: Point, the level's variables.
        inputs: Point, the tensors of the levels above.
        damping: ``delta`` in ``A + delta I``; units of the Hessian's eigenvalues.
    """

    def __init__(
        self,
        residual: ResidualFunction,
        lower: LowerLevel,
        theta: Params,
        inputs: Params,
        damping: float = 0.0,
        *,
        symmetric: bool,
    ) -> None:
        self._function = residual
        self.lower = lower
        self.damping = damping
        self.symmetric = symmetric
        self.scope = Scope(twice=True)
        self.space = lower.space
        self._point = theta, inputs

    @cached_property
    def _theta(self) -> list[Tensor]:
        return algebra.leaves(self._point[0])

    @cached_property
    def _inputs(self) -> list[Tensor]:
        return algebra.leaves(self._point[1])

    @cached_property
    def _residual(self) -> list[Tensor]:
        with torch.enable_grad():
            return self._function(self._theta, self._inputs)

    @cached_property
    def _live(self) -> tuple[list[Tensor], list[int]]:
        """The parts of the residual that have a graph, and their indices."""
        places = [place for place, part in enumerate(self._residual) if part.requires_grad]
        return [self._residual[place] for place in places], places

    @property
    def like(self) -> Params:
        """The level's variables: the operator acts on vectors with their shapes."""
        return self._theta

    def apply(self, vector: Params) -> list[Tensor]:
        """Multiply ``A^T + damping I`` onto ``vector``."""
        count_hvp(self.lower.objective.name)
        with self.scope:
            live, places = self._live
            found = grad(live, self._theta, [vector[place] for place in places], retain_graph=True) if live else []
        product = algebra.zeros_for_none(found or [None] * len(vector), vector)
        return algebra.axpy(self.damping, vector, product) if self.damping else product

    def apply_many(self, vectors: Params) -> list[Tensor]:
        """Multiply onto stacked vectors, by one vectorized reverse pass if all operators have a rule for vmap."""
        if self.lower.objective.nested:
            return self._one_by_one(vectors)
        try:
            with self.scope:
                live = [(r, v) for r, v in zip(self._residual, vectors, strict=True) if r.requires_grad]
                found = torch.autograd.grad(
                    [r for r, _ in live],
                    self._theta,
                    [v for _, v in live],
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
        except NestorError:
            raise
        except RuntimeError:  # an operator without a rule for vmap
            return self._one_by_one(vectors)
        for _ in range(len(vectors[0])):
            count_hvp(self.lower.objective.name)
        products = algebra.zeros_for_none(list(found), vectors)
        return algebra.axpy(self.damping, vectors, products) if self.damping else products

    def secants(self) -> list[tuple[Params, Params]]:
        """Return differences of consecutive states and gradients of the level's last steps, if recorded."""
        if self.lower.trajectory is None:
            return []
        history = self.lower.trajectory.history
        first = len(history.steps) - len(history.gradients)
        points = [
            (history.states[first + index]().params, algebra.zeros_for_none(gradient, self.like))
            for index, gradient in enumerate(history.gradients)
            if first + index in history.states
        ]
        pairs = [(algebra.subtract(b[0], a[0]), algebra.subtract(b[1], a[1])) for a, b in itertools.pairwise(points)]
        return [(s, algebra.axpy(self.damping, s, y) if self.damping else y) for s, y in pairs]

    def apply_transposed(self, vector: Params) -> list[Tensor]:
        """Multiply ``A + damping I`` onto ``vector``: a second reverse pass through the first, if not symmetric."""
        if self.symmetric:
            return self.apply(vector)
        count_hvp(self.lower.objective.name)
        with self.scope:
            probes, pulled = self._pulled
            found = vjp(pulled, probes, vector, retain_graph=True)
        product = algebra.zeros_for_none(found, vector)
        return algebra.axpy(self.damping, vector, product) if self.damping else product

    @cached_property
    def _pulled(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Probes ``u``, and ``A^T u`` with a graph to ``u``: its derivative in ``u`` is the product with ``A``."""
        probes = [torch.zeros_like(t).requires_grad_() for t in self._theta]
        return probes, vjp(self._residual, self._theta, probes, create_graph=True)

    def pull_back(self, vector: Params) -> list[Tensor | None]:
        """Multiply ``B^T`` onto ``vector``: the cotangent on the inputs. Frees the graph."""
        with self.scope:
            return vjp(self._residual, self._inputs, vector)
