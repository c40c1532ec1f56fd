"""Generalized minimal residuals, for any square matrix."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors.options import check_options
from nestor.solvers.checks import bad_product
from nestor.solvers.krylov import Iterate, KrylovSolver
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class GMRES(KrylovSolver):
    r"""Minimise :math:`\lVert b - A x \rVert` over Krylov spaces, with Arnoldi's basis and restarts.

    One product in each iteration, ``restart`` vectors of memory. The matrix need be neither symmetric nor definite.

    Args:
        max_steps: Largest number of products.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.
        restart: Largest dimension of one Krylov space.

    Raises:
        ValueError: If an option is out of range.

    Reference: Saad and Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7(3), 1986.

    Example:
        >>> matrix, b = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.ones(2, requires_grad=True)
        >>> x = torch.linalg.solve(matrix, b.detach())
        >>> x = nestor.root(lambda x, b: matrix @ x - b, x, b, nestor.GMRES(rtol=1e-8))
        >>> torch.autograd.grad(x.sum(), b)  # the sums of the columns of the inverse
        (tensor([0.5000, 0.5000]),)
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, counts=["restart"])

    def iterate(
        self, matrix: LinearOperator, rhs: Params, length: float, goal: float, budget: int, scale: float
    ) -> Iterate:
        space = matrix.space
        eps = torch.finfo(rhs[0].dtype).eps
        basis = [algebra.scale(1 / length, rhs)]
        columns: list[Tensor] = []
        for size in range(1, min(self.restart, budget) + 1):
            vector = matrix.apply(basis[-1])
            total = torch.zeros(())
            for _ in range(2):  # two passes keep the basis orthogonal up to rounding (Kahan, Parlett)
                overlaps = torch.stack([space.dot(b, vector) for b in basis])
                total = total.to(overlaps) + overlaps
                for overlap, b in zip(overlaps, basis, strict=True):
                    vector = algebra.axpy(-overlap, b, vector)
            norm = space.norm(vector)
            # The small problem is solved in double precision on the CPU; the transfer waits for the device.
            column = torch.cat([total, norm[None].to(total)]).cpu()
            columns.append(column.to(torch.promote_types(column.dtype, torch.float64)))
            width = float(torch.linalg.vector_norm(columns[-1]))
            if not math.isfinite(width):  # LAPACK aborts on NaN
                raise bad_product("GMRES")
            scale = max(scale, width)
            if size == 1 and width <= 32 * eps * scale:  # the residual is in the null space
                return Iterate(algebra.scale(0.0, rhs), length, 1, scale, broke=True, singular=True)
            weights, rest = _least_squares(columns, length, 4 * size * eps)
            broke = float(norm) <= 4 * eps * width
            if broke or rest <= goal or size == min(self.restart, budget):
                break
            basis.append(algebra.scale(1 / norm, vector))
        update = [torch.zeros_like(r) for r in rhs]
        for weight, b in zip(weights, basis, strict=True):
            update = algebra.axpy(weight, b, update)
        # In an invariant space the residual is zero, unless the matrix is singular there.
        is_singular = broke and rest > goal + 32 * eps * size * length
        return Iterate(update, rest, size, scale, broke=is_singular, singular=is_singular)


def _least_squares(columns: list[Tensor], length: float, cut: float) -> tuple[list[float], float]:
    """Minimise the residual over one Krylov space; return the weights of its basis, and the norm of the residual.

    Args:
        columns: The columns of Hessenberg's matrix.
        length: The norm of the first residual.
        cut: Singular values below ``cut`` times the largest one count as zero.
    """
    size = len(columns)
    hessenberg = columns[0].new_zeros(size + 1, size)
    for index, column in enumerate(columns):
        hessenberg[: index + 2, index] = column
    target = columns[0].new_zeros(size + 1)
    target[0] = length
    # LAPACK's default driver, gelsy, rounds differently from call to call.
    weights = torch.linalg.lstsq(hessenberg, target[:, None], rcond=cut, driver="gelsd").solution[:, 0]
    return weights.tolist(), float(torch.linalg.vector_norm(target - hessenberg @ weights))
