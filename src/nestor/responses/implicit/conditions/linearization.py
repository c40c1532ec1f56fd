"""A condition, linearized at a point: one graph for all products of a solver and for the mixed product."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, TypeAlias

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


@dataclass(eq=False)
class Linearization(LinearOperator):
    r"""The matrices :math:`A^T + \delta I` and :math:`B^T` of a residual ``r(theta, inputs)`` at a point.

    .. math:: A = \frac{\partial r}{\partial\theta}, \qquad B = \frac{\partial r}{\partial\lambda}

    The residual is evaluated once, with a graph, at the first product. Every product is one reverse pass through it.

    A caller that computes several products enters the :attr:`scope` once around all of them.

    Args:
        function: Evaluates ``r(theta, inputs)`` with a graph to both arguments.
        lower: The level.
        theta: Point, the level's variables.
        inputs: Point, the tensors of the levels above.
        damping: ``delta`` in ``A + delta I``; units of the Hessian's eigenvalues.
        symmetric: Whether ``A`` is symmetric.
        scope: The scope of the graph.
    """

    has_batched_product: ClassVar[bool] = True
    function: ResidualFunction
    lower: LowerLevel
    theta: Params
    inputs: Params
    damping: float = 0.0
    symmetric: bool = True
    scope: Scope = field(default_factory=partial(Scope, twice=True), init=False)

    def __post_init__(self) -> None:
        self.space = self.lower.space

    @property
    def point(self) -> "tuple[ResidualFunction, LowerLevel, Params, Params, float]":
        """What a linearization is built from."""
        return self.function, self.lower, self.theta, self.inputs, self.damping

    @cached_property
    def _theta(self) -> list[Tensor]:
        return algebra.leaves(self.theta)

    @cached_property
    def _inputs(self) -> list[Tensor]:
        return algebra.leaves(self.inputs)

    @cached_property
    def _residual(self) -> list[Tensor]:
        with torch.enable_grad():
            return self.function(self._theta, self._inputs)

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
        if not self.scope.is_innermost:
            with self.scope:
                return self.apply(vector)
        count_hvp(self.lower.objective.name)
        live, places = self._live
        vectors = vector if len(live) == len(vector) else [vector[place] for place in places]
        found = grad(live, self._theta, vectors, retain_graph=True) if live else []
        return self._damped(found or [None] * len(vector), vector)

    def _damped(self, product: Sequence[Tensor | None], vector: Params) -> list[Tensor]:
        found = [torch.zeros_like(v) if p is None else p for p, v in zip(product, vector, strict=True)]
        return algebra.axpy(self.damping, vector, found) if self.damping else found

    def apply_many(self, vectors: Params) -> list[Tensor]:
        """Multiply onto stacked vectors, by one vectorized reverse pass if all operators have a rule for vmap."""
        if self.lower.objective.nested or not self.has_batched_product:
            return super().apply_many(vectors)
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
            return super().apply_many(vectors)
        for _ in range(len(vectors[0])):
            count_hvp(self.lower.objective.name)
        return self._damped(found, vectors)

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
            return self._damped(vjp(pulled, probes, vector, retain_graph=True), vector)

    @cached_property
    def _pulled(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Probes ``u``, and ``A^T u`` with a graph to ``u``: its derivative in ``u`` is the product with ``A``."""
        probes = [torch.zeros_like(t).requires_grad_() for t in self._theta]
        return probes, vjp(self._residual, self._theta, probes, create_graph=True)

    def pull_back(self, vector: Params) -> list[Tensor | None]:
        """Multiply ``B^T`` onto ``vector``: the cotangent on the inputs. Frees the graph."""
        with self.scope:
            return vjp(self._residual, self._inputs, vector)
