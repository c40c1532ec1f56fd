"""Linear solvers on lists of tensors: ``A x = b`` with ``A`` given by its products."""

from nestor.solvers.bicgstab import BiCGSTAB
from nestor.solvers.conjugate_gradient import ConjugateGradient
from nestor.solvers.dense_solve import DenseSolve
from nestor.solvers.gmres import GMRES
from nestor.solvers.identity import Identity
from nestor.solvers.lbfgs_inverse import LBFGSInverse
from nestor.solvers.linear_operator import LinearOperator, Transposed
from nestor.solvers.linear_solver import LinearSolver, Solution, SolveState
from nestor.solvers.minres import MINRES
from nestor.solvers.neumann import Neumann
from nestor.solvers.normal_conjugate_gradient import NormalConjugateGradient
from nestor.solvers.nystrom import Nystrom
from nestor.solvers.preconditioners import Diagonal, HutchinsonDiagonal, NystromPreconditioner, Preconditioner

__all__ = [
    "GMRES",
    "MINRES",
    "BiCGSTAB",
    "ConjugateGradient",
    "DenseSolve",
    "Diagonal",
    "HutchinsonDiagonal",
    "Identity",
    "LBFGSInverse",
    "LinearOperator",
    "LinearSolver",
    "Neumann",
    "NormalConjugateGradient",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "Solution",
    "SolveState",
    "Transposed",
]
