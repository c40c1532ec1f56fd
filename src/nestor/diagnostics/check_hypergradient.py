"""Comparison of responses with a trusted response, on the user's own program."""

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor, nn

from nestor.autodiff.instruments import Evaluations, counting
from nestor.autodiff.torch_private import tree_map
from nestor.errors import NestorError, NestorWarning
from nestor.errors.options import typed
from nestor.explain.display import COMPACT, Shown, broken
from nestor.explain.peak_memory import PeakMemory
from nestor.problem import Problem
from nestor.program import Program, evaluator_of
from nestor.responses import SAMA, T1T2, FiniteDifference, FirstOrder, Implicit, Response, Unrolled
from nestor.solvers import ConjugateGradient, DenseSolve, Neumann, Nystrom
from nestor.vectors import algebra

DENSE_UP_TO = 1_500
Batches = Mapping[str, Any] | None


@dataclass(frozen=True)
class Trial:
    """The measurements of one response.

    Attributes:
        response: The response.
        name: The description of the response.
        cosine: Cosine of the angle between its hypergradient ``h`` and the hypergradient ``h_ref`` of the reference.
        relative_error: ``|h - h_ref| / |h_ref|``.
        scale: ``|h| / |h_ref|``.
        cost: Forwards, gradients and Hessian products, by level.
        seconds: Shortest time of the repetitions.
        memory: Peak bytes of the tensors that the evaluation creates; None if an operator cannot be measured.
        failure: The error message if the evaluation failed; empty otherwise.

    Example:
        >>> low = nestor.Problem(nestor.Variable(torch.ones(())), lambda low, top: (low() - top()) ** 2)
        >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low() ** 2)
        >>> table = nestor.check_hypergradient(nestor.Program(low=low, top=top), "top", responses=[nestor.T1T2()])
        >>> trial = table.trials[0]
        >>> trial.name, round(trial.cosine, 3), round(trial.scale, 3)  # the Hessian is 2, and T1T2 takes it for 1
        ('T1T2', 1.0, 2.0)
    """

    response: Response
    name: str
    cosine: float = float("nan")
    relative_error: float = float("nan")
    scale: float = float("nan")
    cost: Evaluations | None = None
    seconds: float = float("nan")
    memory: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class Comparison(Shown):
    """The measurements of all responses. It prints as a table.

    Attributes:
        level: The level of the hypergradient.
        reference: Description of the trusted response.
        stationarity: For each level below, the norm of its gradient divided by the norm of its variables.
        trials: One per response, in the order of evaluation.

    Example:
        >>> low = nestor.Problem(nestor.Variable(torch.ones(())), lambda low, top: (low() - top()) ** 2)
        >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low() ** 2)
        >>> table = nestor.check_hypergradient(nestor.Program(low=low, top=top), "top", responses=[nestor.T1T2()])
        >>> table.level, len(table.trials), table.stationarity["low"]
        ('top', 1, 0.0)
    """

    level: str
    reference: str
    stationarity: Mapping[str, float]
    trials: tuple[Trial, ...]

    def __rich__(self) -> Table:
        title = f"Hypergradient of {self.level!r} against {self.reference}"
        distances = ", ".join(f"{name} {value:.1e}" for name, value in self.stationarity.items())
        caption = f"error: relative. Gradient norm over parameter norm of the levels below: {distances}."
        names = ("cosine", "error", "scale", "forwards", "gradients", "HVPs", "ms", "MB")
        columns = (Column("response", overflow="fold"), *(Column(name, justify="right") for name in names))
        table = Table(*columns, title=title, title_justify="left", caption=caption, caption_justify="left", **COMPACT)
        for trial in self.trials:
            if trial.failure or trial.cost is None:
                table.add_row(trial.name, f"[dim]{trial.failure}[/dim]", *[""] * 7)
                continue
            quality = (f"{trial.cosine:.4f}", f"{trial.relative_error:.1e}", f"{trial.scale:.3g}")
            kinds = (trial.cost.forwards, trial.cost.gradients, trial.cost.hvps)
            counts = (str(sum(count.values())) for count in kinds)
            memory = "?" if trial.memory is None else f"{trial.memory / 1e6:.2f}"
            table.add_row(broken(trial.name), *quality, *counts, f"{1e3 * trial.seconds:.1f}", memory)
        return table


@typed
def check_hypergradient(
    program: Program,
    name: str,
    batches: Batches = None,
    *,
    responses: Sequence[Response] | None = None,
    reference: Response | None = None,
    repetitions: int = 3,
) -> Comparison:
    """Compare responses with a trusted response at the present point of a program, and measure their cost.

    The function sets each response in turn for all levels below ``name``. The default reference is implicit
    differentiation, by a dense solve for levels of up to 1,500 variables and by a long conjugate-gradient solve for
    larger ones. The reference is evaluated in double precision on copies of the modules, or in the program's own
    precision if the losses do not accept doubles. The reference is exact if the levels below are at their minima; the
    caption of the table shows how stationary they are. ``Unrolled`` first takes ``unroll_steps`` steps of the levels
    below, so its hypergradient belongs to the point after these steps.

    Args:
        program: The program; it does not change.
        name: The level of the hypergradient.
        batches: One batch for the level and one for each level below that takes a batch, by level name.
        responses: The responses to compare; None takes the common responses that apply.
        reference: The trusted response; None chooses by the size of the levels.
        repetitions: Number of timed evaluations; the shortest time counts.

    Returns:
        The measurements of all responses, as a table that prints.

    Raises:
        ValueError: If the level has no level below, or a batch is missing.

    Example:
        >>> low, top = nestor.Variable(torch.full((2,), 2.0)), nestor.Variable(torch.full((2,), 2.0))
        >>> fit = lambda low, top: (torch.tensor([1.0, 4.0]) * (low() - top()) ** 2).sum()
        >>> check = nestor.Problem(top, lambda low: low().square().sum())
        >>> program = nestor.Program(low=nestor.Problem(low, fit), top=check)
        >>> table = nestor.check_hypergradient(program, "top", responses=[nestor.T1T2(), nestor.Implicit()])
        >>> [f"{trial.name}: {trial.cosine:.2f}" for trial in table.trials]
        ['T1T2: 0.86', 'Implicit(ConjugateGradient()): 1.00']
    """
    if name not in program.levels:
        raise ValueError(f"check_hypergradient(name={name!r}): the levels are {', '.join(map(repr, program.levels))}.")
    if repetitions < 1:
        raise ValueError(f"check_hypergradient(repetitions={repetitions}) must be an integer of at least 1.")
    for response in responses or ():
        if not isinstance(response, Response):
            raise TypeError(f"check_hypergradient(responses=...): {response!r} is not a Response such as T1T2().")
    below = evaluator_of(program).below(name)[:-1]
    if not below:
        raise ValueError(f"Level {name!r} has no level below it: its gradient is exact; there is nothing to compare.")
    trusted = reference or _trusted(program, below)
    tried = responses if responses is not None else _applicable(program, below)
    with warnings.catch_warnings():
        # The table shows how good a truncated solve is; a run warns of it.
        warnings.simplefilter("ignore", NestorWarning)
        truth = _reference(program, name, batches, trusted)
        trials = [_try(program, name, batches, response, truth, repetitions) for response in tried]
    return Comparison(name, trusted.describe(), _stationarity(program, below, batches), tuple(trials))


def _with_response(program: Program, name: str, response: Response) -> Program:
    """Return the program in which ``response`` is the response of all levels below ``name``."""
    return program.with_responses(dict.fromkeys(evaluator_of(program).below(name)[:-1], response))


def _trusted(program: Program, below: Sequence[str]) -> Response:
    largest = max(algebra.size(program.levels[lower].parameters) for lower in below)
    if largest <= DENSE_UP_TO:
        return Implicit(solver=DenseSolve())
    return Implicit(solver=ConjugateGradient(max_steps=1_000, rtol=1e-10))


def _applicable(program: Program, below: Sequence[str]) -> list[Response]:
    steps = all(_steps(program.levels[lower].problem) for lower in below)
    found: list[Response] = [FirstOrder(), T1T2(), FiniteDifference(), *([SAMA()] if steps else [])]
    conjugate = [ConjugateGradient(max_steps=max_steps, rtol=1e-6) for max_steps in (5, 20)]
    solvers = (Neumann(num_terms=10, step_size=None), *conjugate, Nystrom(rank=10))
    found += [*(Implicit(solver=solver) for solver in solvers), *([Unrolled()] if steps else [])]
    own = program.levels[below[0]].response  # the present response of the program comes first
    return found if own in found else [own, *found]


def _steps(problem: Problem) -> bool:
    optimizer = problem.optimizer
    return problem.update is not None or (optimizer is not None and "differentiable" in optimizer.defaults)


def _flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().double().reshape(-1) for value in gradient.values()])


def _reference(program: Program, name: str, batches: Batches, trusted: Response) -> Tensor:
    """Evaluate the trusted response, in double precision if the losses accept doubles."""
    try:
        doubled = {key: _double(batch) for key, batch in (batches or {}).items()}
        return _flat(_with_response(_in_double(program), name, trusted).hypergradient(name, doubled))
    except NestorError:
        raise
    except (RuntimeError, TypeError, ValueError):  # a loss that creates tensors in single precision
        return _flat(_with_response(program, name, trusted).hypergradient(name, batches))


def _double(batch: Any) -> Any:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)


def _in_double(program: Program) -> Program:
    """Return a copy of the program with modules in double precision."""
    problems = {name: level.problem for name, level in program.levels.items()}
    modules = nn.ModuleDict({f"level_{name}": problem.module for name, problem in problems.items()})
    parameters = {name: list(level.stepping.parameters) for name, level in program.levels.items()}
    copies, variables = copy.deepcopy((modules, parameters))
    copies.double()
    doubled = {}
    for name, problem in problems.items():
        doubled[name] = Problem(
            copies[f"level_{name}"],
            problem.loss,
            variables=variables[name],
            data=problem.data,
            unroll_steps=problem.unroll_steps,
            tasks=problem.tasks,
            vectorize=problem.vectorize,
            reads=problem.reads,
        )
    return Program(nesting=program.nesting, **doubled)


def _try(program: Program, name: str, batches: Batches, response: Response, truth: Tensor, repetitions: int) -> Trial:
    label, length = response.describe(), truth.norm()
    try:
        candidate = _with_response(program, name, response)
        with counting() as cost:
            value = _flat(candidate.hypergradient(name, batches))
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            candidate.hypergradient(name, batches)
            seconds.append(time.perf_counter() - start)
    except (NestorError, ValueError) as error:
        return Trial(response, label, failure=str(error))
    value = value.to(truth.device)
    size = value.norm()
    return Trial(
        response,
        label,
        cosine=float(value @ truth / (size * length).clamp(min=1e-300)),
        relative_error=float((value - truth).norm() / length.clamp(min=1e-300)),
        scale=float(size / length.clamp(min=1e-300)),
        cost=cost,
        seconds=min(seconds),
        memory=_memory(candidate, name, batches),
    )


def _memory(program: Program, name: str, batches: Batches) -> int | None:
    try:
        with PeakMemory() as memory:
            program.hypergradient(name, batches)
    except (RuntimeError, NotImplementedError):  # an operator that a dispatch mode cannot intercept
        return None
    return int(memory.peak)


def _stationarity(program: Program, below: Sequence[str], batches: Batches) -> dict[str, float]:
    """For each level below, divide the norm of its gradient by the norm of its variables."""
    found = {}
    for lower in below:
        level = program.levels[lower]
        norm = torch.linalg.vector_norm(_flat(program.hypergradient(lower, batches)))
        found[lower] = float(norm / level.space.norm([p.detach().double() for p in level.parameters]).clamp(min=1e-300))
    return found
