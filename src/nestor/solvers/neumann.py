"""The truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_tracing, require_true
from nestor.autodiff.scalar import divide, read_or_keep, tensor, where
from nestor.errors import SolverError
from nestor.solvers.finite import finite_norm
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.solvers.random_vector import normalized, random_like
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    r"""Approximate :math:`A^{-1} b \approx \alpha \sum_{k=0}^{K-1} (I - \alpha A)^k b` with ``K = num_terms``.

    The series converges if every eigenvalue of ``A`` lies between 0 and :math:`2/\alpha`. ``K - 1`` products. It equals
    the gradient through the last ``K`` steps of gradient descent with learning rate :math:`\alpha` at a fixed point.

    Args:
        num_terms: Number of terms ``K``.
        step_size: :math:`\alpha`, in units of one over the eigenvalues of the lower Hessian; None takes one over the
            largest eigenvalue, estimated by a power iteration in every solve. A matrix that is not symmetric may need
            a smaller one, such that :math:`|\lambda - 1/\alpha| < 1/\alpha` for all its eigenvalues.
        power_steps: Products of that power iteration.

    Raises:
        ValueError: If ``num_terms`` or ``step_size`` is not positive.

    Reference: Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
    AISTATS 2020, algorithm 3.
    """

    needs_definite: ClassVar[bool] = True
    num_terms: int = 10
    step_size: float | None = 0.1
    power_steps: int = 8

    def __post_init__(self) -> None:
        if self.num_terms < 1:
            raise ValueError(f"Neumann(num_terms={self.num_terms}) must be at least 1.")
        if self.power_steps < 1:
            raise ValueError(f"Neumann(power_steps={self.power_steps}) must be at least 1.")
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"Neumann(step_size={self.step_size}) must be positive and finite.")

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        """Sum the series.

        Raises:
            SolverError: If the terms grow: the series diverges.
        """
        space = matrix.space
        step_size: float | Tensor = self._largest_step(matrix, rhs) if self.step_size is None else self.step_size
        term, total = list(rhs), list(rhs)
        for _ in range(self.num_terms - 1):
            term = algebra.axpy(-step_size, matrix.apply(term), term)
            total = algebra.add(total, term)
        # The last term measures what is missing: |b - A x| = |(I - alpha A)^K b|, up to one more product.
        first, last = space.norm(rhs), space.norm(term)
        relative = tensor(divide(read_or_keep(last), where(read_or_keep(first) == 0, 1.0, read_or_keep(first))), last)
        # One look a solve, after the fact: on an accelerator this waits for the solve once.
        if is_tracing():
            require_true(relative <= 1 + 1e-3)
        elif not bool(relative <= 1 + 1e-3):
            finite_norm(space, rhs, "Neumann")
            raise SolverError(
                f"Neumann(num_terms={self.num_terms}, step_size={float(step_size):.3g}) diverges: its last term is "
                f"{relative.item():.3g} times the first. The matrix has an eigenvalue above 2 / step_size, or below 0. "
                "Take a smaller step_size (below 2 / the largest eigenvalue of the lower Hessian), or add damping."
            )
        iterations = torch.tensor(self.num_terms - 1)
        return Solution(algebra.scale(step_size, total), {"residual": relative, "iterations": iterations})

    def _largest_step(self, matrix: LinearOperator, rhs: Params) -> Tensor:
        r"""One over the largest eigenvalue, by a power iteration from a vector that is always the same.

        A few steps underestimate it. Of a symmetric matrix an eigenvalue lies within :math:`|A v - \theta v|` of the
        Rayleigh quotient :math:`\theta = v^T A v`; their sum costs nothing, is above :math:`|A v|` by at most a factor
        :math:`\sqrt 2`, and becomes exact as the iteration converges.
        """
        space = matrix.space
        vector = normalized(space, random_like(space, rhs, seed=0))
        product = matrix.apply(vector)
        largest = space.norm(product)
        for _ in range(self.power_steps - 1):
            vector = normalized(space, product)
            product = matrix.apply(vector)
            largest = torch.maximum(largest, space.norm(product))
        quotient = space.dot(vector, product)
        bound = quotient.abs() + space.norm(algebra.axpy(-quotient, vector, product))
        largest = torch.maximum(largest, bound)
        return 1 / torch.where(largest == 0, 1.0, largest)

    def max_products(self, dimension: int) -> int:
        """``num_terms - 1``, and those of the power iteration."""
        return self.num_terms - 1 + (self.power_steps if self.step_size is None else 0)
