"""The cost of exact nesting, computed without evaluating anything."""

import warnings
from collections.abc import Iterator
from functools import cache
from typing import TypeAlias

from nestor.errors import NestorWarning
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.nesting import LowerNode
from nestor.vectors import algebra

Passes: TypeAlias = "tuple[tuple[int, Passes], ...]"
"""The reverse passes through a graph: how many, and the passes through the result of each of these."""

MOST = 1000
"""An update that evaluates losses more often than this is worth a warning."""


def warn_of_nested_cost(evaluator: Evaluator) -> None:
    """Warn once if an update of a level evaluates losses more than a thousand times because of exact nesting."""
    for level in evaluator.levels.values():
        middle = [name for name in evaluator.below(level.name)[:-1] if evaluator.levels[name].lowers]
        if not (evaluator.nesting.nested and middle):
            continue
        count = evaluations(evaluator, level)
        if count > MOST:
            warnings.warn(
                f"One update of level {level.name!r} evaluates losses about {count:,} times: with nesting='exact' the "
                f"objectives of {', '.join(map(repr, middle))} contain the responses of their lowers, which are "
                "differentiated again. The cost grows by a factor with every level. Program(nesting='frozen') "
                "evaluates one response of each level; it is an approximation, because other levels are constants in "
                "each response. Problem(response=FirstOrder()) for a level in the middle leaves out the terms through "
                "its response.",
                NestorWarning,
                stacklevel=5,  # through the check of the engine's arguments
            )
            return


def evaluations(evaluator: Evaluator, level: Level) -> int:
    r"""Count the evaluations of losses in one update of a level, under exact nesting.

    A reverse pass through an objective pulls a cotangent back through the response of each level below once. If the
    result of the pass is differentiated, so is each of these pullbacks. With :math:`C_l(P)` the evaluations for an
    objective with the passes :math:`P`, and :math:`R_i(P)` those of a pullback that the passes :math:`P` follow,

    .. math:: C_l(P) = a_l + \sum_{i \text{ below } l} \sum_{p \in P} R_i(P \text{ after } p)

    where :math:`a_l` is the number of micro-batches. For a response that differentiates one gradient, such as T1T2,
    :math:`R_i(P) = C_i` of two passes and then :math:`P`. If every level reads every other, the count grows by a factor
    of about four with each level.
    """

    @cache
    def objective(name: str, differentiable: tuple[str, ...], passes: Passes) -> int:
        level = evaluator.levels[name]
        nodes = evaluator.nesting.order(level, differentiable)
        return level.problem.accumulate + sum(
            times * pullback(node, later) for times, later in _each(passes) for node in nodes
        )

    def pullback(node: LowerNode, later: Passes) -> int:
        level = node.level
        work = level.response.work(level.problem.unroll_steps, algebra.size(level.parameters))
        known = (level.name, *node.layout.sizes)
        if work.is_shared and not later:
            return objective(level.name, known, _chain(1, ((work.products + 1, ()),)))
        total = work.gradients * objective(level.name, known, _chain(work.passes, later))
        return total + (solve(level.name, known, work.products, later) if work.products else 0)

    @cache
    def solve(name: str, known: tuple[str, ...], products: int, later: Passes) -> int:
        # One gradient with a graph, and a pass through it for each product. Every later pass solves once more, and
        # differentiates the matrix: a product of second order.
        again = sum(
            times * (solve(name, known, products, rest) + objective(name, known, _chain(3, rest)))
            for times, rest in _each(later)
        )
        return again + objective(name, known, _chain(1, ((products, ()),)))

    total = level.problem.accumulate
    return total + sum(pullback(node, ()) for node in evaluator.nesting.order(level, (level.name,)))


def _each(passes: Passes) -> Iterator[tuple[int, Passes]]:
    """List all passes: how often each is taken, and the passes that follow it."""
    for times, later in passes:
        yield times, later
        for more, last in _each(later):
            yield times * more, last


def _chain(length: int, later: Passes) -> Passes:
    """Return ``length`` passes, one through the result of the other, and ``later`` passes through the last."""
    return later if not length else ((1, _chain(length - 1, later)),)
