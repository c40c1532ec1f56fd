"""The inverse replaced by a scaled identity."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nestor.errors.options import check_options
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class Identity(LinearSolver):
    r"""Take :math:`A^{-1} \approx \text{scale} \cdot I`: no product, no solve.

    The result is a scaled gradient if the Hessian is a multiple of the identity, and one step of an unrolled gradient
    descent if ``scale`` is its learning rate; otherwise it is a descent direction under the conditions of Luketina et
    al. (2016), not a gradient.

    Args:
        scale: The factor, in units of one over the eigenvalues of the lower Hessian. 1.0 keeps the norm of the mixed
            product; the lower learning rate makes the result the gradient through one SGD step.

    Raises:
        ValueError: If ``scale`` is not positive and finite.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> one_step = nestor.Implicit(solver=nestor.Identity(scale=0.1))  # T1T2(scale=0.1)
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, one_step)
        >>> torch.autograd.grad(theta, weight)  # of one SGD step of length 0.1: 0.1 times the curvature 2
        (tensor(0.2000),)
    """

    needs_matrix: ClassVar[bool] = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, positive=["scale"])

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        return Solution(self.approximate(rhs))

    def approximate(self, rhs: Params) -> Params:
        """Return ``scale * rhs``: ``rhs`` itself for 1.0."""
        return rhs if self.scale == 1.0 else algebra.scale(self.scale, rhs)

    def max_products(self, dimension: int) -> int:
        """Return 0."""
        return 0
