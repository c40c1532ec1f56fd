"""The solvers of loops written by hand, on whatever arrays a library has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.workloads.regression import Regression


def solve(problem: Regression, method: str, v: Any, product: Callable[[Any], Any]) -> Any:
    """Multiply the inverse of the matrix that ``product`` multiplies onto ``v``, as far as the method goes."""
    if method == "exact":
        return v
    if method == "neumann":
        total = term = v
        for _ in range(problem.terms - 1):
            term = term - problem.series_step * product(term)
            total = total + term
        return problem.series_step * total
    x, r = 0 * v, v
    p, rr = r, r @ r
    for _ in range(problem.terms):
        ap = product(p)
        a = rr / (ap @ p)
        x, r = x + a * p, r - a * ap
        new = r @ r
        p, rr = r + (new / rr) * p, new
    return x
