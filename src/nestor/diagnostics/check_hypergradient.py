"""Comparison of responses with a trusted one, on the user's own program."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nestor.autodiff.instruments import Evaluations, counting
from nestor.autodiff.torch_private import tree_map
from nestor.errors import NestorError
from nestor.explain.peak_memory import PeakMemory
from nestor.problem import Problem
from nestor.program import Program
from nestor.responses import SAMA, T1T2, FiniteDifference, FirstOrder, Implicit, Response, Unrolled
from nestor.solvers import ConjugateGradient, DenseSolve, Neumann, Nystrom
from nestor.vectors import algebra

DENSE_UP_TO = 1_500


@dataclass(frozen=True)
class Trial:
    """The measurements of one response.

    Attributes:
        response: The response.
        name: Its description.
        cosine: Cosine of the angle between its hypergradient ``h`` and that of the reference, ``h_ref``.
        relative_error: ``|h - h_ref| / |h_ref|``.
        scale: ``|h| / |h_ref|``.
        cost: Forwards, gradients and Hessian products, by level.
        seconds: Shortest time of the repetitions.
        memory: Peak bytes of tensors, without those that existed before; None if an operator cannot be measured.
        failure: The error message if the evaluation failed; empty otherwise.
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
class Comparison:
    """The measurements of all responses, as a table that prints.

    Attributes:
        level: The level of the hypergradient.
        reference: Description of the trusted response.
        stationarity: For each level below, the norm of its gradient divided by the norm of its variables.
        trials: One per response, in the order of evaluation.
    """

    level: str
    reference: str
    stationarity: Mapping[str, float]
    trials: tuple[Trial, ...]

    def __rich__(self) -> Table:
        """Build the table."""
        table = Table(title=f"Hypergradient of {self.level!r} against {self.reference}", title_justify="left")
        table.add_column("response", overflow="fold")
        for column in ("cosine", "relative error", "scale", "forwards", "gradients", "HVPs", "ms", "MB"):
            table.add_column(column, justify="right")
        for trial in self.trials:
            if trial.failure:
                table.add_row(trial.name, f"[dim]{trial.failure}[/dim]", *[""] * 7)
                continue
            assert trial.cost is not None
            counts = (trial.cost.forwards, trial.cost.gradients, trial.cost.hvps)
            table.add_row(
                trial.name,
                f"{trial.cosine:.4f}",
                f"{trial.relative_error:.1e}",
                f"{trial.scale:.3g}",
                *(str(sum(count.values())) for count in counts),
                f"{1e3 * trial.seconds:.1f}",
                "?" if trial.memory is None else f"{trial.memory / 1e6:.2f}",
            )
        away = ", ".join(f"{name} {value:.1e}" for name, value in self.stationarity.items())
        table.caption = f"Gradient norm over parameter norm of the levels below: {away}."
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        """Render the table as text."""
        console = Console(file=io.StringIO(), width=160)
        console.print(self)
        text = console.file
        assert isinstance(text, io.StringIO)
        return text.getvalue()


def check_hypergradient(
    program: Program,
    name: str,
    batches: Mapping[str, Any] | None = None,
    *,
    responses: Sequence[Response] | None = None,
    reference: Response | None = None,
    repetitions: int = 3,
) -> Comparison:
    """Compare responses with a trusted one at the present point of a program, and measure their cost.

    Each response in turn is the response of all levels below ``name``. The default reference is implicit
    differentiation, by a dense solve for levels of up to 1,500 variables and by a long conjugate-gradient solve for
    larger ones. It runs in double precision on copies of the modules, or in the program's own precision if the losses
    do not accept doubles. The reference is exact if the levels below are at their minima; the caption of the table
    shows how stationary they are. ``Unrolled`` first takes ``unroll_steps`` steps of the levels below, so its
    hypergradient belongs to the point after these steps.

    Args:
        program: The program; it does not change.
        name: The level of the hypergradient.
        batches: One batch for the level and each level below it that takes one, by level name.
        responses: The responses to compare; None takes the common responses that apply.
        reference: The trusted response; None chooses by the size of the levels.
        repetitions: Number of timed evaluations; the shortest time counts.

    Raises:
        ValueError: If the level has no level below, or a batch is missing.
    """
    below = [lower for lower in program.evaluator.below(name) if lower != name]
    if not below:
        raise ValueError(
            f"Level {name!r} has no level below it: its gradient is exact, so there is nothing to compare."
        )
    trusted = reference or _trusted(program, below)
    truth = _reference(program, name, batches, below, trusted)
    length = truth.norm()
    tried = responses if responses is not None else _applicable(program, below)
    trials = [_try(program, name, batches, below, response, truth, length, repetitions) for response in tried]
    return Comparison(name, trusted.describe(), _stationarity(program, below, batches), tuple(trials))


def _trusted(program: Program, below: Sequence[str]) -> Response:
    largest = max(algebra.size(program.levels[lower].parameters) for lower in below)
    if largest <= DENSE_UP_TO:
        return Implicit(solver=DenseSolve())
    return Implicit(solver=ConjugateGradient(max_steps=1_000, rtol=1e-10, truncate=True))


def _applicable(program: Program, below: Sequence[str]) -> list[Response]:
    found: list[Response] = [FirstOrder(), T1T2(), FiniteDifference()]
    steps = all(_steps(program.levels[lower].problem) for lower in below)
    if steps:
        found.append(SAMA())
    found += [
        Implicit(solver=Neumann(num_terms=10, step_size=None)),
        Implicit(solver=ConjugateGradient(max_steps=5, rtol=1e-6)),
        Implicit(solver=ConjugateGradient(max_steps=20, rtol=1e-6)),
        Implicit(solver=Nystrom(rank=10)),
    ]
    if steps:
        found.append(Unrolled())
    # The present response of the program comes first.
    own = [program.levels[lower].response for lower in below]
    return [*(r for r in own[:1] if r not in found), *found]


def _steps(problem: Problem) -> bool:
    optimizer = problem.optimizer
    return problem.update is not None or (optimizer is not None and "differentiable" in optimizer.defaults)


def _flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().double().reshape(-1) for value in gradient.values()])


def _reference(
    program: Program, name: str, batches: Mapping[str, Any] | None, below: Sequence[str], trusted: Response
) -> Tensor:
    """Evaluate the trusted response, in double precision if the losses accept doubles."""
    try:
        doubled = {key: _double(batch) for key, batch in (batches or {}).items()}
        return _flat(_in_double(program).with_responses(dict.fromkeys(below, trusted)).hypergradient(name, doubled))
    except NestorError:
        raise
    except (RuntimeError, TypeError, ValueError):  # a loss that creates tensors in single precision
        return _flat(program.with_responses(dict.fromkeys(below, trusted)).hypergradient(name, batches))


def _double(batch: Any) -> Any:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)


def _in_double(program: Program) -> Program:
    """Return a copy of the program with modules in double precision."""
    problems = {name: level.problem for name, level in program.levels.items()}
    modules: nn.ModuleDict = nn.ModuleDict({f"level_{name}": problem.module for name, problem in problems.items()})
    copies, variables = copy.deepcopy(
        (modules, {n: list(level.stepping.parameters) for n, level in program.levels.items()})
    )
    copies.double()
    return Program(
        nesting=program.nesting,
        **{
            name: Problem(
                copies[f"level_{name}"],
                problem.loss,
                variables=variables[name],
                data=problem.data,
                unroll_steps=problem.unroll_steps,
                tasks=problem.tasks,
            )
            for name, problem in problems.items()
        },
    )


def _try(
    program: Program,
    name: str,
    batches: Mapping[str, Any] | None,
    below: Sequence[str],
    response: Response,
    truth: Tensor,
    length: Tensor,
    repetitions: int,
) -> Trial:
    label = response.describe()
    try:
        candidate = program.with_responses(dict.fromkeys(below, response))
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


def _memory(program: Program, name: str, batches: Mapping[str, Any] | None) -> int | None:
    try:
        with PeakMemory() as memory:
            program.hypergradient(name, batches)
    except (RuntimeError, NotImplementedError):  # an operator that a dispatch mode cannot intercept
        return None
    return int(memory.peak)


def _stationarity(program: Program, below: Sequence[str], batches: Mapping[str, Any] | None) -> dict[str, float]:
    """For each level below, divide the norm of its gradient by the norm of its variables."""
    found = {}
    for lower in below:
        level = program.levels[lower]
        gradient = program.hypergradient(lower, batches)
        norm = torch.linalg.vector_norm(_flat(gradient))
        found[lower] = float(norm / level.space.norm([p.detach().double() for p in level.parameters]).clamp(min=1e-300))
    return found
