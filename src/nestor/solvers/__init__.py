"""Linear solvers on lists of tensors: ``A x = b`` with ``A`` known only by its products."""

from nestor.solvers.conjugate_gradient import ConjugateGradient
from nestor.solvers.dense_solve import DenseSolve
from nestor.solvers.identity import Identity
from nestor.solvers.linear_operator import LinearOperator
from nestor.solvers.linear_solver import LinearSolver, Solution
from nestor.solvers.neumann import Neumann

__all__ = ["ConjugateGradient", "DenseSolve", "Identity", "LinearOperator", "LinearSolver", "Neumann", "Solution"]
