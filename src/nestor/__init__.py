"""nestor: gradient-based multilevel optimization in PyTorch.

A best response is an autograd node; everything else is PyTorch.
"""

from nestor import callbacks, diagnostics, optim
from nestor.best_response import best_response

# Conditions: what a best response satisfies.
from nestor.conditions import Condition, FixedPoint, Stationarity

# Cross derivatives: the mixed second derivative times a vector.
from nestor.cross import CentralDifference, CrossDerivative, ForwardMode, ReverseMode
from nestor.engine import Engine
from nestor.errors import LossError, NestorError, NonFiniteError, SolverError

# Declaring and running programs.
from nestor.problem import Problem
from nestor.program import Program

# Responses: the ways to differentiate through a best response.
from nestor.responses import SAMA, T1T2, FiniteDifference, FirstOrder, Implicit, Response, Unrolled
from nestor.root import fixed_point, root

# Linear solvers.
from nestor.solvers import (
    GMRES,
    MINRES,
    BiCGSTAB,
    ConjugateGradient,
    DenseSolve,
    Identity,
    LinearSolver,
    Neumann,
    NormalConjugateGradient,
)
from nestor.variable import Variable

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "MINRES",
    "SAMA",
    "T1T2",
    "BiCGSTAB",
    "CentralDifference",
    "Condition",
    "ConjugateGradient",
    "CrossDerivative",
    "DenseSolve",
    "Engine",
    "FiniteDifference",
    "FirstOrder",
    "FixedPoint",
    "ForwardMode",
    "Identity",
    "Implicit",
    "LinearSolver",
    "LossError",
    "NestorError",
    "Neumann",
    "NonFiniteError",
    "NormalConjugateGradient",
    "Problem",
    "Program",
    "Response",
    "ReverseMode",
    "SolverError",
    "Stationarity",
    "Unrolled",
    "Variable",
    "best_response",
    "callbacks",
    "diagnostics",
    "fixed_point",
    "optim",
    "root",
]
