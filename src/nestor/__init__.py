"""nestor: gradient-based multilevel optimization in PyTorch.

A best response is an autograd node; everything else is PyTorch.
"""

from typing import TYPE_CHECKING, Any

from nestor import callbacks, diagnostics, optim
from nestor.checkpoints.folder import load_checkpoint
from nestor.checkpoints.forms import register_batch
from nestor.data.episodes import Episodes
from nestor.diagnostics import check_hypergradient
from nestor.distributed import Runtime, SingleDevice
from nestor.engine import Engine
from nestor.errors import (
    CheckpointError,
    LossError,
    NestorError,
    NestorWarning,
    NonFiniteError,
    NotAFunctionError,
    ProcessError,
    ReplayError,
    SingularError,
    SolverError,
    UnsupportedError,
)

# Estimators, for losses that sample or have no derivative.
from nestor.estimators import ScoreFunction, smoothed
from nestor.functional import best_response, fixed_point, root

# Declaring and running programs.
from nestor.problem import Problem, Reformulation
from nestor.program import Program

# Reformulations: first-order methods that replace the nested problem.
from nestor.reformulations import BOME, F2SA, PBGD, ValuePenalty

# Responses: the ways to differentiate through a best response.
from nestor.responses import (
    SAMA,
    T1T2,
    EvolutionStrategies,
    FiniteDifference,
    FirstOrder,
    ForwardUnrolled,
    Implicit,
    Response,
    Unrolled,
)

# Conditions: what a best response satisfies.
from nestor.responses.implicit.conditions import (
    Condition,
    Curvature,
    FiniteDifferenceHessian,
    FixedPoint,
    GaussNewton,
    Hessian,
    Stationarity,
    outputs,
)

# Cross derivatives: the mixed second derivative times a vector.
from nestor.responses.implicit.cross import (
    CentralDifference,
    CrossDerivative,
    ForwardMode,
    ReusedDifference,
    ReusedGraph,
    ReverseMode,
)

# Linear solvers.
from nestor.solvers import (
    GMRES,
    MINRES,
    BiCGSTAB,
    ConjugateGradient,
    DenseSolve,
    Diagonal,
    HutchinsonDiagonal,
    Identity,
    LBFGSInverse,
    LinearSolver,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    NystromPreconditioner,
    Preconditioner,
)
from nestor.variable import Variable
from nestor.version import __version__

if TYPE_CHECKING:
    from nestor.distributed.data_parallel import DataParallel
    from nestor.distributed.fully_sharded import FullySharded

__all__ = [
    "BOME",
    "F2SA",
    "GMRES",
    "MINRES",
    "PBGD",
    "SAMA",
    "T1T2",
    "BiCGSTAB",
    "CentralDifference",
    "CheckpointError",
    "Condition",
    "ConjugateGradient",
    "CrossDerivative",
    "Curvature",
    "DataParallel",
    "DenseSolve",
    "Diagonal",
    "Engine",
    "Episodes",
    "EvolutionStrategies",
    "FiniteDifference",
    "FiniteDifferenceHessian",
    "FirstOrder",
    "FixedPoint",
    "ForwardMode",
    "ForwardUnrolled",
    "FullySharded",
    "GaussNewton",
    "Hessian",
    "HutchinsonDiagonal",
    "Identity",
    "Implicit",
    "LBFGSInverse",
    "LinearSolver",
    "LossError",
    "NestorError",
    "NestorWarning",
    "Neumann",
    "NonFiniteError",
    "NormalConjugateGradient",
    "NotAFunctionError",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "Problem",
    "ProcessError",
    "Program",
    "Reformulation",
    "ReplayError",
    "Response",
    "ReusedDifference",
    "ReusedGraph",
    "ReverseMode",
    "Runtime",
    "ScoreFunction",
    "SingleDevice",
    "SingularError",
    "SolverError",
    "Stationarity",
    "Unrolled",
    "UnsupportedError",
    "ValuePenalty",
    "Variable",
    "__version__",
    "best_response",
    "callbacks",
    "check_hypergradient",
    "diagnostics",
    "fixed_point",
    "load_checkpoint",
    "optim",
    "outputs",
    "register_batch",
    "root",
    "smoothed",
]


def __getattr__(name: str) -> Any:
    """Import the runtimes of several processes when they are asked for: one process needs no torch.distributed."""
    if name == "DataParallel":
        from nestor.distributed.data_parallel import DataParallel

        return DataParallel
    if name == "FullySharded":
        from nestor.distributed.fully_sharded import FullySharded

        return FullySharded
    raise AttributeError(f"module 'nestor' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, with those that are imported when they are asked for."""
    return sorted(__all__)
