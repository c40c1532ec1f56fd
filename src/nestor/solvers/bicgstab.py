"""Stabilized biconjugate gradients, for any square matrix."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.solvers.checks import bad_product
from nestor.solvers.krylov import Iterate, KrylovSolver
from nestor.solvers.linear_operator import LinearOperator
from nestor.vectors import Params, algebra

# A solution of more than this times |b| / |A|, without convergence, is one along directions that are nearly flat.
_LARGEST = 1e3


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(KrylovSolver):
    r"""Solve a non-symmetric system with two products in each iteration and seven vectors of memory.

    Args:
        max_steps: Largest number of iterations.
        rtol: Stop when :math:`\lVert b - A x \rVert \le \text{rtol} \cdot \lVert b \rVert`.

    Raises:
        ValueError: If an option is out of range.

    Reference: van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13(2), 1992.

    Example:
        >>> matrix, b = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.ones(2, requires_grad=True)
        >>> x = torch.linalg.solve(matrix, b.detach())
        >>> x = nestor.root(lambda x, b: matrix @ x - b, x, b, nestor.BiCGSTAB())
        >>> torch.autograd.grad(x.sum(), b)  # the sums of the columns of the inverse
        (tensor([0.5000, 0.5000]),)
    """

    def iterate(
        self, matrix: LinearOperator, rhs: Params, length: float, goal: float, budget: int, scale: float
    ) -> Iterate:
        space = matrix.space
        tiny = 4 * torch.finfo(rhs[0].dtype).eps  # relative: what is smaller is rounding
        x = [torch.zeros_like(b) for b in rhs]
        residual = shadow = direction = list(rhs)
        rho, rest, peak, step, singular, broke = length**2, length, length, 0, False, False
        best, lowest = x, length
        while step < budget and rest > goal:
            step += 1
            product = matrix.apply(direction)
            below, image, width = _read(space.dot(shadow, product), space.norm(product), space.norm(direction))
            if not math.isfinite(image):
                raise bad_product("BiCGSTAB")
            scale = max(scale, image / width)
            broke = abs(below) <= tiny * length * image
            if broke:
                break
            alpha = rho / below
            half = algebra.axpy(-alpha, product, residual)
            x = algebra.axpy(alpha, direction, x)
            shortest = float(space.norm(half))
            if shortest <= goal:
                rest = shortest
                break
            other = matrix.apply(half)
            overlap, length_of_other = space.dot(other, half), space.norm(other)
            omega = overlap / length_of_other / length_of_other
            whole = algebra.axpy(omega, half, x)
            residual = algebra.axpy(-omega, other, half)
            dot, rest, along, image, size = _read(
                space.dot(shadow, residual), space.norm(residual), overlap, length_of_other, space.norm(whole)
            )
            if not math.isfinite(image):
                raise bad_product("BiCGSTAB")
            scale = max(scale, image / shortest)
            singular = image <= tiny * scale * shortest
            if singular or abs(along) <= tiny * image * shortest:  # the second half of the step divides by zero
                broke, rest, size = True, shortest, float(space.norm(x))
            else:
                x, broke = whole, rest > goal and abs(dot) <= tiny * length * rest
            peak = max(peak, rest)
            if rest < lowest and scale * size <= _LARGEST * length:
                best, lowest = x, rest
            if broke:
                break
            beta = (dot / rho) * (alpha / (along / image / image))
            rho = dot
            direction = algebra.axpy(beta, algebra.axpy(-omega, product, direction), residual)
        if rest > goal and best is not x:
            # The last iterate is long, or far from the best one.
            x, rest, broke = best, lowest, True
        # The residuals of the recurrence keep the rounding errors of the largest one.
        return Iterate(x, rest, step, scale, drift=peak / length, broke=broke, singular=singular)

    def max_products(self, dimension: int) -> int:
        """Return two products for each iteration. A product that measures a residual may come on top."""
        return 2 * self.max_steps


def _read(*values: Tensor) -> list[float]:
    """Read scalars with one transfer from the device."""
    found: list[float] = torch.stack(values).tolist()
    return found
