"""Preconditioners: approximate inverses that a Krylov solver applies to its residuals."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.torch_private import foreach_mul
from nestor.errors import SolverError
from nestor.errors.options import check_options
from nestor.solvers.checks import check_symmetric
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.probes import column_approximation, random_like
from nestor.vectors import Params, Tree, flatten

ApproximateInverse: TypeAlias = Callable[[Params], list[Tensor]]
"""Multiplies an approximation of the inverse of one matrix onto a vector."""


class Preconditioner(ABC):
    """A symmetric positive definite approximation of the inverse of a matrix. A frozen dataclass without state.

    Example:
        >>> class Halve(nestor.Preconditioner):
        ...     def prepare(self, matrix, like):
        ...         return lambda residual: [r / 2 for r in residual]
        ...     def max_products(self, dimension):
        ...         return 0
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=1, preconditioner=Halve()))
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta, weight)
        (tensor(1.),)
    """

    @abstractmethod
    def prepare(self, matrix: LinearOperator, like: Params) -> ApproximateInverse:
        """Return the approximate inverse of ``matrix``. A solver calls this once in every solve.

        Args:
            matrix: The matrix of the system.
            like: A vector with the shapes, dtypes and devices of the system.

        Raises:
            SolverError: If the preconditioner does not fit the matrix.
        """

    @abstractmethod
    def max_products(self, dimension: int) -> int:
        """Return the largest number of products with the matrix that ``prepare`` takes, for ``explain()``."""


@dataclass(frozen=True, eq=False)
class Diagonal(Preconditioner):
    """Divide by a diagonal that is known or guessed, such as curvatures by layer or the weights of a regularizer.

    Takes no product. If the diagonal is not known, use :class:`HutchinsonDiagonal`.

    Args:
        values: The diagonal of the matrix, up to a common factor: one tensor for each of the level's variables, in a
            flat list or nested as the variables are. Each tensor has the shape of its variable or a shape that
            broadcasts to it (such as a scalar for each layer). The tensors are read in every solve, so a change in
            place takes effect.

    Raises:
        ValueError: If there is no tensor, or an entry is not positive and finite.

    Example:
        >>> weight, scales = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 100.0])
        >>> solver = nestor.ConjugateGradient(max_steps=1, preconditioner=nestor.Diagonal([scales]))
        >>> loss = lambda t, w: (scales * (t - w) ** 2).sum()
        >>> theta = nestor.best_response(loss, weight.detach(), weight, nestor.Implicit(solver=solver))
        >>> torch.autograd.grad(theta.sum(), weight)  # one iteration; without the preconditioner, two
        (tensor([1., 1.]),)
    """

    values: Tree = field(repr=False)

    def __post_init__(self) -> None:
        entries = flatten(self.values, "values")
        if not entries or any(t.is_complex() or not bool((torch.isfinite(t) & (t > 0)).all()) for t in entries):
            raise ValueError(
                "Diagonal(values) needs tensors whose entries are all positive and finite; otherwise the "
                "preconditioner is not positive definite. Clamp the entries, or use HutchinsonDiagonal(), which does."
            )

    def prepare(self, matrix: LinearOperator, like: Params) -> ApproximateInverse:
        """Invert the entries.

        Raises:
            SolverError: If the tensors do not fit the level's variables.
        """
        entries = flatten(self.values)
        if len(entries) != len(like) or not all(map(_broadcasts, entries, like)):
            raise SolverError(
                f"Diagonal was given tensors of shapes {[tuple(t.shape) for t in entries]}; the level's variables have "
                f"the shapes {[tuple(part.shape) for part in like]}. Give one tensor for each variable, in their order."
            )
        return _scaling([1 / t.to(part) for t, part in zip(entries, like, strict=True)])

    def max_products(self, dimension: int) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True, kw_only=True)
class HutchinsonDiagonal(Preconditioner):
    r"""Divide by the diagonal of the matrix, estimated with random signs.

    .. math:: \text{diag}(A) \approx \frac1n \sum_i z_i \odot A z_i, \qquad z_i \in \{-1, 1\}^d

    For systems whose variables have different scales, such as a layer and its bias, or an embedding that few samples
    use.

    Args:
        samples: :math:`n`, the number of products.
        seed: Seed of the random signs.
        floor: Smallest entry relative to the largest entry; it keeps the preconditioner positive definite.

    Raises:
        ValueError: If ``samples`` or ``floor`` is not positive.

    Reference: Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57, 2007.

    Example:
        >>> weight, scales = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 100.0])
        >>> solver = nestor.ConjugateGradient(max_steps=1, preconditioner=nestor.HutchinsonDiagonal(samples=1))
        >>> loss = lambda t, w: (scales * (t - w) ** 2).sum()
        >>> theta = nestor.best_response(loss, weight.detach(), weight, nestor.Implicit(solver=solver))
        >>> torch.autograd.grad(theta.sum(), weight)  # one iteration; the estimate is exact for a diagonal matrix
        (tensor([1., 1.]),)
    """

    samples: int = 8
    seed: int = 0
    floor: float = 1e-4

    def __post_init__(self) -> None:
        check_options(self, counts=["samples"], positive=["floor"])

    def prepare(self, matrix: LinearOperator, like: Params) -> ApproximateInverse:
        """Estimate the diagonal and invert it."""
        total = [torch.zeros_like(t) for t in like]
        for sample in range(self.samples):
            signs = random_like(matrix.space, like, self.seed + sample, signs=True)
            product = matrix.apply(signs)
            total = [t + s * p / self.samples for t, s, p in zip(total, signs, product, strict=True)]
        top = matrix.space.largest(total)
        least = torch.where(top == 0, 1.0, self.floor * top)
        return _scaling([1 / torch.maximum(t.abs(), least) for t in total])

    def max_products(self, dimension: int) -> int:
        """Return ``samples``."""
        return self.samples


@dataclass(frozen=True, kw_only=True)
class NystromPreconditioner(Preconditioner):
    r"""Reduce the large eigenvalues found from ``k`` columns of the matrix to the smallest of them.

    .. math:: P^{-1} r = U\, s_k S^{-1}\, U^T r + (r - U U^T r), \qquad A \approx C W^{+} C^T = U S U^T

    For matrices with few eigenvalues that are much larger than the others: the number of iterations then depends on
    the others alone. ``prepare`` computes ``k`` products at once in every solve, and stores ``k + 1`` vectors.

    Args:
        rank: ``k``.
        seed: Seed of the choice of the columns.

    Raises:
        ValueError: If ``rank`` is not positive.

    Reference: Frangella, Tropp, Udell, Randomized Nyström preconditioning, SIAM J. Matrix Anal. Appl. 44(2), 2023.

    Example:
        >>> weight, scales = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 100.0])
        >>> solver = nestor.ConjugateGradient(max_steps=1, preconditioner=nestor.NystromPreconditioner(rank=2))
        >>> loss = lambda t, w: (scales * (t - w) ** 2).sum()
        >>> theta = nestor.best_response(loss, weight.detach(), weight, nestor.Implicit(solver=solver))
        >>> torch.autograd.grad(theta.sum(), weight)  # one iteration; without the preconditioner, two
        (tensor([1.0000, 1.0000]),)
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, counts=["rank"])

    def prepare(self, matrix: LinearOperator, like: Params) -> ApproximateInverse:
        """Compute the columns and their eigenvectors.

        Raises:
            SolverError: If the matrix is not symmetric, or a column is not finite.
        """
        check_symmetric(matrix, "NystromPreconditioner")
        space = matrix.space
        rank = min(self.rank, sum(space.lengths(like)))
        vectors, values = column_approximation(matrix, like, rank, self.seed, "NystromPreconditioner")
        seen = vectors.square().sum(dim=0) > 0.5  # the eigenvectors of the eigenvalue zero are zero vectors
        # Without any nonzero eigenvalue all vectors are zero, and the value of `smallest` has no effect.
        smallest = torch.where(seen, values, torch.inf).min()
        shrinkage = torch.where(seen, smallest / torch.where(seen, values, 1.0) - 1, 0.0)  # (k,), s_k / s_i - 1

        def apply(vector: Params) -> list[Tensor]:
            r = space.flat(vector)
            return space.parts(r + vectors @ (shrinkage * (vectors.T @ r)), vector)

        return apply

    def max_products(self, dimension: int) -> int:
        """Return ``rank``, or the dimension if it is smaller."""
        return min(self.rank, dimension)


def _scaling(inverse: list[Tensor]) -> ApproximateInverse:
    """Return the multiplication of every entry by the inverted entry of a diagonal."""
    return lambda vector: list(foreach_mul(list(vector), inverse))


def _broadcasts(values: Tensor, part: Tensor) -> bool:
    sizes = zip(reversed(values.shape), reversed(part.shape), strict=False)
    return values.dim() <= part.dim() and all(size in (1, other) for size, other in sizes)
