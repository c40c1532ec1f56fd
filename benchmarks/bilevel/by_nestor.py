"""The same problems as nestor programs, one for each response and for F2SA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import SGD

import nestor
from benchmarks.bilevel.problems import Problem
from benchmarks.bilevel.published import INNER_STEPS, TERMS


@dataclass(frozen=True)
class Recipe:
    """How a program differs from the others.

    Attributes:
        response: Makes the response from the inner step size; None for a reformulation.
        unroll_steps: Inner steps between two outer ones.
        reformulation: Replaces the response.
        gradients: Gradients of one sample in a gradient of the level's loss, where it is not one.
        mixed: Products with the mixed derivative in a pullback through the response.
    """

    response: Callable[[float], nestor.Response] | None
    unroll_steps: int = INNER_STEPS
    reformulation: nestor.Reformulation | None = None
    gradients: dict[str, int] = field(default_factory=dict)
    mixed: int = 1


def _neumann(terms: int, **options: bool) -> Callable[[float], nestor.Response]:
    return lambda step: nestor.Implicit(solver=nestor.Neumann(num_terms=terms, step_size=step), **options)


def _conjugate_gradient(steps: int, **options: bool) -> Callable[[float], nestor.Response]:
    return lambda step: nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=steps, rtol=0.0), **options)


# SAMA is left out: with SGD its preconditioner is the inner step size, so it is FiniteDifference with another scale.
METHODS: dict[str, Recipe] = {
    "T1T2": Recipe(lambda step: nestor.T1T2(), unroll_steps=1),
    "FiniteDifference": Recipe(lambda step: nestor.FiniteDifference(), unroll_steps=1, mixed=0),
    "ConjugateGradient": Recipe(_conjugate_gradient(TERMS)),
    "ConjugateGradient, warm": Recipe(_conjugate_gradient(2, warm_start=True)),
    "Neumann": Recipe(_neumann(TERMS)),
    "Neumann, warm, 1 term": Recipe(_neumann(1, warm_start=True), unroll_steps=1),
    "Unrolled": Recipe(lambda step: nestor.Unrolled(keep_graphs=False), mixed=INNER_STEPS),
    # The penalized inner loss holds F and G, the outer loss F and twice G.
    "F2SA": Recipe(None, reformulation=nestor.F2SA(), gradients={"inner": 2, "outer": 3}, mixed=0),
}


class Batches:
    """Endless random batches of indices."""

    def __init__(self, count: int, batch: int) -> None:
        self.count, self.batch = count, batch

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randint(self.count, (self.batch,))


def make_program(problem: Problem, recipe: Recipe, step: float, outer_step: float, seed: int, batch: int = 64):
    """Return the program of a recipe."""
    theta, lam = (nestor.Variable(tensor) for tensor in problem.start(seed))

    def inner_loss(index: Tensor, inner: nn.Module, outer: nn.Module) -> Tensor:
        return problem.inner(inner(), outer(), index)

    def outer_loss(index: Tensor, outer: nn.Module, inner: nn.Module) -> Tensor:
        return problem.outer(inner(), outer(), index)

    return nestor.Program(
        inner=nestor.Problem(
            theta,
            inner_loss,
            data=Batches(problem.num_inner, batch),
            optimizer=SGD(theta.parameters(), lr=step),
            unroll_steps=recipe.unroll_steps,
            response=recipe.response(step) if recipe.response is not None else None,
            reformulation=recipe.reformulation,
        ),
        outer=nestor.Problem(
            lam, outer_loss, data=Batches(problem.num_outer, batch), optimizer=SGD(lam.parameters(), lr=outer_step)
        ),
    )


class Solved:
    """A run of nestor's engine, with the interface of :class:`benchmarks.bilevel.published.Published`."""

    def __init__(
        self, problem: Problem, recipe: Recipe, step: float, outer_step: float, seed: int, batch: int = 64
    ) -> None:
        self.recipe, self.batch, self.evaluations = recipe, batch, 0
        self.program = make_program(problem, recipe, step, outer_step, seed, batch)
        self.engine = nestor.Engine(self.program, seed=seed, check=False)
        self.cost = 0

    @property
    def theta(self) -> Tensor:
        # Of a reformulation, the copy minimises the inner function.
        name = "inner" if self.recipe.reformulation is None else "inner_value"
        return self.program.levels[name].parameters[0].detach()

    @property
    def lam(self) -> Tensor:
        return self.program.levels["outer"].parameters[0].detach()

    def advance(self, evaluations: int) -> None:
        """Run until the count of evaluations is reached."""
        if not self.cost:
            self._run(1)  # a warm start takes one product more from the second update on
            first = self.evaluations
            self._run(1)
            self.cost = self.evaluations - first
        updates = -(-(evaluations - self.evaluations) // self.cost)
        if updates > 0:
            self._run(updates)

    def _run(self, updates: int) -> None:
        with nestor.diagnostics.count_evaluations(self.program) as count:
            self.engine.run(updates * self.recipe.unroll_steps)
        gradients = sum(self.recipe.gradients.get(level, 1) * n for level, n in count.gradients.items())
        mixed = self.recipe.mixed * count.responses.total()
        self.evaluations += self.batch * (gradients + count.hvps.total() + mixed)
