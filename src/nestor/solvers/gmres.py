"""Generalized minimal residuals, for any square matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import check_options
from nestor.solvers.checks import check_finite
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
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, counts=["restart"])

    def iterate(self, matrix: LinearOperator, rhs: Params, length: Tensor, goal: Tensor) -> Iterate:
        space = matrix.space
        x = [torch.zeros_like(b) for b in rhs]
        residual = list(rhs)
        steps = 0
        # Every comparison of the residual waits for the device, once in each iteration.
        while steps < self.max_steps and bool(length > goal) and bool(length > 0):
            previous = length
            taken, update, length = self._cycle(matrix, residual, length, goal, self.max_steps - steps)
            steps += taken
            x = algebra.add(x, update)
            # If no product is left to compute the true residual, its norm is that of the least-squares problem.
            if steps < self.max_steps:
                residual = algebra.subtract(rhs, matrix.apply(x))
                steps += 1
                length = space.norm(residual)
                check_finite(length, "GMRES")
                if bool(length > 0.9999 * previous):
                    break
        return x, length, steps

    def _cycle(
        self, matrix: LinearOperator, residual: Params, length: Tensor, goal: Tensor, budget: int
    ) -> tuple[int, list[Tensor], Tensor]:
        """Minimise over one Krylov space; return the number of products, the update of x and the residual's norm."""
        space = matrix.space
        basis = [algebra.scale(1 / length, residual)]
        columns: list[Tensor] = []
        update = [torch.zeros_like(r) for r in residual]
        for size in range(1, min(self.restart, budget) + 1):
            vector = matrix.apply(basis[-1])
            coefficients = length.new_zeros(size)
            for _ in range(2):  # two passes keep the basis orthogonal up to rounding (Kahan, Parlett)
                overlaps = torch.stack([space.dot(b, vector) for b in basis])
                coefficients = coefficients + overlaps
                for overlap, b in zip(overlaps, basis, strict=True):
                    vector = algebra.axpy(-overlap, b, vector)
            height = space.norm(vector)
            check_finite(height, "GMRES")  # LAPACK aborts on NaN
            columns.append(torch.cat([coefficients, height[None]]))
            hessenberg = length.new_zeros(size + 1, size)
            for index, column in enumerate(columns):
                hessenberg[: index + 2, index] = column
            target = length.new_zeros(size + 1)
            target[0] = length
            # LAPACK's default driver on the CPU, gelsy, rounds differently from call to call.
            driver = "gelsd" if length.device.type == "cpu" else None
            weights = torch.linalg.lstsq(hessenberg, target[:, None], driver=driver).solution[:, 0]
            rest = torch.linalg.vector_norm(target - hessenberg @ weights)
            breakdown = height <= torch.finfo(length.dtype).eps * torch.linalg.vector_norm(columns[-1])
            if size == min(self.restart, budget) or bool((rest <= goal) | breakdown):
                for weight, b in zip(weights, basis, strict=True):
                    update = algebra.axpy(weight, b, update)
                return size, update, rest
            basis.append(algebra.scale(1 / height, vector))
        return 0, update, length
