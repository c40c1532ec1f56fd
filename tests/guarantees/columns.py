"""The columns of the table: responses, compiled steps, and runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import truth
from torch import Tensor
from truth import DAMPING, Truth

import nestor


@dataclass(frozen=True)
class Column:
    """A response, its own formula by plain autograd, and how the engine runs.

    Attributes:
        response: The response.
        formula: Its formula.
        at_start: Whether the formula is a function of the variables at the start, not at the end.
        before_last: Whether the formula is a function of the variables before the last step.
        compile: Whether the steps are compiled; the hypergradient is then that of the second upper step, because the
            first one is eager.
        runtime: Name of the runtime of two processes; None runs in one process.
    """

    response: Callable[[], nestor.Response]
    formula: Callable[[Truth], Tensor]
    at_start: bool = False
    before_last: bool = False
    compile: bool = False
    runtime: str | None = None


_solved = truth.by_matrix(truth.damped)


def _cg() -> nestor.Response:
    return nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=300, rtol=1e-13), damping=DAMPING)


def _reused() -> nestor.Response:
    return nestor.T1T2(reuse=True)


def _reused_difference() -> nestor.Response:
    return nestor.FiniteDifference(reuse=True)


def _forward_mode() -> nestor.Response:
    return nestor.T1T2(cross=nestor.ForwardMode())


RESPONSES: dict[str, Column] = {
    "T1T2": Column(nestor.T1T2, truth.identity),
    "T1T2, forward mode": Column(_forward_mode, truth.identity),
    "FiniteDifference": Column(nestor.FiniteDifference, truth.difference),
    "T1T2, reused": Column(_reused, truth.reused, before_last=True),
    "FiniteDifference, reused": Column(_reused_difference, truth.reused_difference, before_last=True),
    "SAMA": Column(nestor.SAMA, truth.sama),
    "CG": Column(_cg, _solved),
    "GMRES": Column(lambda: nestor.Implicit(solver=nestor.GMRES(max_steps=300, rtol=1e-13), damping=DAMPING), _solved),
    "Neumann": Column(
        lambda: nestor.Implicit(solver=nestor.Neumann(num_terms=5, step_size=0.05)), truth.by_matrix(truth.series)
    ),
    "DenseSolve": Column(lambda: nestor.Implicit(solver=nestor.DenseSolve(), damping=DAMPING), _solved),
    "Unrolled, step": Column(nestor.Unrolled, truth.unrolled, True),
    "Unrolled, sqrt": Column(lambda: nestor.Unrolled(checkpoint="sqrt"), truth.unrolled, True),
    "Unrolled, tree": Column(lambda: nestor.Unrolled(checkpoint="tree"), truth.unrolled, True),
    "Unrolled, none": Column(lambda: nestor.Unrolled(checkpoint="none"), truth.unrolled, True),
    "ForwardUnrolled": Column(nestor.ForwardUnrolled, truth.unrolled, True),
}
COMPILED: dict[str, Column] = {
    "T1T2, compiled": Column(nestor.T1T2, truth.identity, compile=True),
    "T1T2, reused, compiled": Column(_reused, truth.reused, before_last=True, compile=True),
    "Unrolled, compiled": Column(nestor.Unrolled, truth.unrolled, True, compile=True),
}
RUNTIMES: dict[str, Column] = {
    f"{name}, {runtime}": Column(response, formula, at_start, name.endswith("reused"), runtime=runtime)
    for runtime in ("DataParallel", "FullySharded")
    for name, response, formula, at_start in (
        ("T1T2", nestor.T1T2, truth.identity, False),
        ("FiniteDifference", nestor.FiniteDifference, truth.difference, False),
        ("T1T2, forward mode", _forward_mode, truth.identity, False),
        ("T1T2, reused", _reused, truth.reused, False),
        ("FiniteDifference, reused", _reused_difference, truth.reused_difference, False),
        ("SAMA", nestor.SAMA, truth.sama, False),
        ("CG", _cg, _solved, False),
        ("Unrolled", nestor.Unrolled, truth.unrolled, True),
    )
}
