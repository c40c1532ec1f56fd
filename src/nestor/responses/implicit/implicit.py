"""Implicit differentiation: condition x solver x cross derivative."""

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.autodiff.instruments import add_to_counters, counting, is_tracing, require_true
from nestor.autodiff.scope import enclosed
from nestor.autodiff.torch_private import over_batch
from nestor.errors import NestorWarning, SolverError
from nestor.errors.options import check_options
from nestor.optim.history_spec import HistorySpec, merged
from nestor.responses.implicit.conditions import Condition, Stationarity
from nestor.responses.implicit.conditions.linearization import Linearization
from nestor.responses.implicit.cross import CentralDifference, CrossDerivative, ReusedDifference, ReusedGraph
from nestor.responses.implicit.printing import brief, is_default, show
from nestor.responses.implicit.unsolved import warn_if_unsolved
from nestor.responses.response import Response
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.solvers import ConjugateGradient, LinearOperator, LinearSolver, Solution, SolveState, Transposed
from nestor.solvers.checks import remedy
from nestor.vectors import Params, algebra, split

_STRICT = "Implicit(..., strict=True) makes this an error."


@dataclass(frozen=True, kw_only=True)
class Implicit(Response):
    r"""Differentiate the optimality condition ``r(theta, inputs) = 0`` of the lower level.

    .. math:: \Big(\frac{d\theta^*}{d\lambda}\Big)^T c = -\Big(\frac{\partial r}{\partial\lambda}\Big)^T z, \qquad
        (A + \delta I)^T z = c, \quad A = \frac{\partial r}{\partial\theta}

    Exact at a point where the condition holds and for an exact solve. A first derivative evaluates the level once: one
    forward, one gradient with a graph, the solver's products, and one more reverse pass. For a higher derivative, the
    solve is assumed to be exact: its derivative is :math:`-A^{-1} (dA) z`, which is another solve.

    Args:
        solver: Solves the linear system.
        condition: What the best response satisfies.
        cross: How :math:`\partial r/\partial\lambda` is applied; ``None`` uses the graph of the solve or, for a solver
            that needs no matrix, the cheapest exact method.
        damping: :math:`\delta`, in units of the Hessian's eigenvalues.
        warm_start: In an engine, start each solve from the solution of the last upper step: few iterations are then
            enough (AmIGO); with ``Neumann(num_terms=1)``, one step of a single loop (SOBA).
        strict: Whether a solve that is truncated, at negative curvature or because it diverges, is an error. Otherwise
            its result is used, a warning says so once for each level, and the metric ``upper/lower_truncated`` of a run
            counts such solves.
        label: The name in tables; if it is empty, tables show the composition.

    Raises:
        ValueError: If ``damping`` is negative, or ``warm_start`` is set for a solver that does not solve a system.

    References:
        Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016. Lorraine, Vicol, Duvenaud,
        Optimizing millions of hyperparameters by implicit differentiation, AISTATS 2020.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> exact = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=20, rtol=1e-6))
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, exact)
        >>> (slope,) = torch.autograd.grad(theta**3, weight, create_graph=True)
        >>> slope.item(), torch.autograd.grad(slope, weight)[0].item()  # 3 weight^2 and 6 weight
        (12.0, 12.0)
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)
    condition: Condition = field(default_factory=Stationarity)
    cross: CrossDerivative | None = None
    damping: float = 0.0
    warm_start: bool = False
    strict: bool = False
    label: str = field(default="", compare=False)
    # The expression of a named method; a changed copy (dataclasses.replace) has none.
    expression: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_options(self, tolerances=["damping"])
        if self.warm_start and not self.solver.needs_matrix:
            raise ValueError(f"Implicit(warm_start=True): {type(self.solver).__name__} does not solve a system.")

    @property
    def exact_counterpart(self) -> Response | None:
        if type(self.cross) is ReusedDifference:
            return replace(self, cross=ReusedGraph())  # at the same point, before the last step
        return replace(self, cross=None) if type(self.cross) is CentralDifference else None

    @property
    def tolerance(self) -> float:
        """The relative error of the cross derivative above which a run warns."""
        return 0.0 if self.cross is None else self.cross.tolerance

    @property
    def assumes_stationarity(self) -> bool:
        """True if the solver solves a system; otherwise the response is an approximate descent direction."""
        return self.solver.needs_matrix

    @property
    def differentiates_twice(self) -> bool:
        """False if all derivatives of gradients are differences."""
        if self.solver.needs_matrix and self.condition.differentiates_twice:
            return True
        return not self.solver.needs_matrix if self.cross is None else self.cross.differentiates_twice

    @property
    def differentiates_steps(self) -> bool:
        """Whether the condition is that of an optimizer step."""
        return self.condition.differentiates_steps

    @property
    def history_spec(self) -> HistorySpec | None:
        """The history that the condition, the solver and the cross derivative need."""
        count = self.solver.num_secants
        secants = HistorySpec(window=count + 1, spacing=1, gradients=True) if count else None
        crossed = self.cross.history_spec if self.cross is not None else None
        only_mixed = self.cross is not None and not self.solver.needs_matrix
        noted = self.condition.mixed_history_spec if only_mixed else self.condition.history_spec
        return merged(merged(noted, secants), crossed)

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Solve, then apply the cross derivative; see :class:`Response`.

        Raises:
            SolverError: If the solve fails, or, with ``strict``, if it is truncated.
        """
        if not self.solver.needs_matrix:
            adjoint = self.solver.approximate(cotangent)
        elif torch.is_grad_enabled():
            adjoint = _Solve.apply(  # type: ignore[no-untyped-call]
                self, lower, True, len(theta), *cotangent, *theta, *inputs
            )
        else:
            linearization = self.condition.linearize(lower, theta, inputs, self.damping)
            with linearization.scope:
                adjoint = self._solve(linearization, cotangent, lower.solve)
                if self.cross is None:
                    return algebra.negative(linearization.pull_back(adjoint))
        if lower.solve is not None and lower.solve.value:
            adjoint = list(adjoint)  # a cross derivative may empty the list, but the next solve starts from it
        return algebra.negative(self.condition.mixed_product(lower, theta, inputs, adjoint, self.cross))

    def _solve(self, matrix: Linearization, cotangent: Params, state: SolveState | None) -> Params:
        """Solve the system with the memory of the last solve; with ``warm_start``, start from its solution."""
        if state is None:
            solution = self.solver.solve(matrix, cotangent)
            self._notice(matrix, solution, None)
            return solution.value
        if self.warm_start and state.value:
            start = state.value
            rest = algebra.subtract(cotangent, matrix.apply(start))
            if self.solver.needs_definite:
                # Along negative curvature, such a solver would increase the solution at every solve: start from zero.
                curvature = matrix.space.dot(start, algebra.subtract(cotangent, rest))
                keep = (curvature > 0).to(curvature.dtype)
                start = algebra.scale(keep, start)
                rest = [torch.where(keep > 0, r, c) for r, c in zip(rest, cotangent, strict=True)]
            length = matrix.space.norm(cotangent)
            found = self.solver.solve(matrix, rest, reference=length, memory=state.memory)
            stats = dict(found.stats)
            if "residual" in stats:
                stats["residual"] = stats["residual"] * matrix.space.norm(rest) / torch.where(length == 0, 1.0, length)
            solution = replace(found, value=algebra.add(start, found.value), stats=stats)
        else:
            solution = self.solver.solve(matrix, cotangent, memory=state.memory)
        self._notice(matrix, solution, state)
        state.update(matrix.space, solution, keep_value=self.warm_start)
        return solution.value

    def _notice(self, matrix: Linearization, solution: Solution, state: SolveState | None) -> None:
        """Raise an error of a truncated solve if ``strict``; otherwise warn, or leave the warning to the run."""
        flag = solution.stats.get("truncated")
        if matrix.lower.alone and not is_tracing() and (flag is None or not bool(flag)):
            warn_if_unsolved(matrix.lower.objective.name, self.solver, solution)
        if flag is None:
            return
        if is_tracing():
            if self.strict:
                require_true(~flag)
        elif self.strict and bool(flag):
            raise SolverError(self._truncation)
        elif state is None and bool(flag):
            level = matrix.lower.objective.name
            warnings.warn(f"Level {level!r}: {self._truncation} {_STRICT}", NestorWarning, stacklevel=2)
        if state is not None and not state.notice:
            state.notice = f"{self._truncation} {_STRICT}"

    @property
    def _truncation(self) -> str:
        name = type(self.solver).__name__
        return f"{name} {self.solver.truncation}. {remedy(self.damping)}, or {self.solver.alternative}."

    def __repr__(self) -> str:
        return self.expression or brief(self)

    def describe(self) -> str:
        """Name the solver, and the options that differ from their defaults."""
        if self.label:
            return self.label
        rest = [
            name for name in ("condition", "cross", "damping", "warm_start", "strict") if not is_default(self, name)
        ]
        parts = [brief(self.solver), *(f"{name}={show(getattr(self, name))}" for name in rest)]
        return f"Implicit({', '.join(parts)})"

    def work(self, steps: int, dimension: int) -> Work:
        """Return the work of the cross derivative and, if the solver needs a matrix, of the products of the solve."""
        work = CrossDerivative.work if self.cross is None else self.cross.work
        if not self.solver.needs_matrix:
            return work
        return replace(work, products=self.solver.max_products(dimension), is_shared=self.cross is None)

    def for_counting(self, dimension: int) -> Response:
        """Return a response whose solver does the largest possible number of products."""
        if not self.solver.needs_matrix:
            return self
        return replace(self, solver=_Counted(solver=self.solver, dimension=dimension))


@dataclass(frozen=True, kw_only=True)
class _Counted(LinearSolver):
    """Counts the products of ``solver`` on a system of ``dimension``, for a system of any size."""

    solver: LinearSolver
    dimension: int

    def solve(
        self, matrix: LinearOperator, rhs: Params, *, reference: Tensor | None = None, memory: Params = ()
    ) -> Solution:
        times = self.max_products(self.dimension)
        if times > 0:
            matrix.apply(rhs)  # the first product evaluates the level as well
        if times > 1:
            with counting() as one:
                matrix.apply(rhs)
            add_to_counters(one, times - 2)
        return Solution(list(rhs))

    def max_products(self, dimension: int) -> int:
        return self.solver.max_products(self.dimension)


class _Solve(torch.autograd.Function):
    r"""``(v, theta, inputs) -> z = A(theta, inputs)^{-T} v``, or ``A^{-1} v``, differentiable to any order.

    .. math:: A^T z = v \quad\Rightarrow\quad dz = A^{-T} (dv - (dA)^T z)
    """

    @staticmethod
    def forward(
        ctx: Any, method: Implicit, lower: LowerLevel, transposed: bool, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        vector, theta, inputs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        matrix = method.condition.linearize(lower, theta, inputs, method.damping)
        with matrix.scope:
            solution = method.solver.solve(matrix if transposed else Transposed(matrix), [v.detach() for v in vector])
            method._notice(matrix, solution, None)
        ctx.method, ctx.lower, ctx.transposed, ctx.count = method, lower, transposed, count
        ctx.save_for_backward(*solution.value, *theta, *inputs)
        return tuple(solution.value)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *over_batch(partial(_Solve._pull_back, ctx), cotangent))

    @staticmethod
    def _pull_back(ctx: Any, *cotangent: Tensor) -> list[Tensor | None]:
        method, lower, count = ctx.method, ctx.lower, ctx.count
        tensors = ctx.saved_tensors
        solution, theta, inputs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        create_graph = torch.is_grad_enabled()
        solved: tuple[Tensor, ...] = _Solve.apply(  # type: ignore[no-untyped-call]
            method, lower, not ctx.transposed, count, *cotangent, *theta, *inputs
        )
        # d z = -A^{-T} (dA)^T z: the bilinear form <left, A right> is differentiated in the matrix alone.
        left, right = (solution, solved) if ctx.transposed else (solved, solution)

        def form(tensors: list[Tensor]) -> list[Tensor | None]:
            point, given, one, other = split(tensors, [count, len(inputs), count, count])
            residual = method.condition.residual(lower, point, given)
            product = algebra.zeros_for_none(vjp(residual, point, one, create_graph=True), point)
            return vjp(product, [*point, *given], [-r for r in other], create_graph=create_graph)

        curvature = enclosed(form, [*theta, *inputs, *left, *right])
        return [*solved, *curvature]
