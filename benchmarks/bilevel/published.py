"""Published stochastic methods, in plain torch: SOBA, SABA, AmIGO, stocBiO and F2SA.

Notation: inner function ``G(theta, lam)``, outer function ``F(theta, lam)``, ``v`` an estimate of the solution of

    d2G/dtheta2 v = -dF/dtheta,    so that the hypergradient is    dF/dlam + d2G/dlam dtheta v.

Each step of a method is one update of ``lam``. ``evaluations`` counts derivatives of one sample: gradients,
Hessian-vector products, and products with the mixed derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.bilevel.problems import Problem

INNER_STEPS = 10
TERMS = 10


class Published(ABC):
    """A stochastic method.

    Args:
        problem: The problem.
        step: Step size of the inner variable and of the linear system.
        outer_step: Step size of the outer variable.
        seed: Of the start and of the batches.
        batch: Samples in a batch.
    """

    def __init__(self, problem: Problem, step: float, outer_step: float, seed: int, batch: int = 64) -> None:
        self.problem, self.step, self.outer_step, self.batch = problem, step, outer_step, batch
        self.theta, self.lam = problem.start(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.evaluations = 0
        self.v = torch.zeros_like(self.theta)

    @abstractmethod
    def update(self) -> None:
        """Take one step of the outer variable, with all that belongs to it."""

    def advance(self, evaluations: int) -> None:
        """Take steps until the count of evaluations is reached."""
        while self.evaluations < evaluations:
            self.update()

    def draw(self, count: int) -> Tensor:
        return torch.randint(count, (self.batch,), generator=self.generator)

    def inner_gradient(self, theta: Tensor, index: Tensor) -> Tensor:
        """Return dG/dtheta: one evaluation a sample."""
        return self._gradients(self.problem.inner, theta, index)[0]

    def outer_gradients(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return dF/dtheta and dF/dlam: one evaluation a sample."""
        return self._gradients(self.problem.outer, theta, index)

    def _gradients(self, function: Callable[..., Tensor], theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += len(index)
        theta, lam = theta.detach().requires_grad_(), self.lam.detach().requires_grad_()
        in_theta, in_lam = torch.autograd.grad(function(theta, lam, index), (theta, lam), allow_unused=True)
        return in_theta, torch.zeros_like(lam) if in_lam is None else in_lam

    def products(self, v: Tensor, index: Tensor, *, hessian: bool = True, mixed: bool = True) -> list[Tensor]:
        """Return dG/dtheta, then d2G/dtheta2 v and d2G/dlam dtheta v where asked for: one evaluation a sample each."""
        self.evaluations += (1 + hessian + mixed) * len(index)
        theta, lam = self.theta.detach().requires_grad_(), self.lam.detach().requires_grad_()
        value = self.problem.inner(theta, lam, index)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        wanted = [variable for variable, asked in ((theta, hessian), (lam, mixed)) if asked]
        return [gradient.detach(), *torch.autograd.grad(gradient, wanted, v)]

    def descend(self, steps: int) -> None:
        """Take steps of stochastic gradient descent on the inner function."""
        for _ in range(steps):
            self.theta = self.theta - self.step * self.inner_gradient(self.theta, self.draw(self.problem.num_inner))


class SOBA(Published):
    """All three variables step at once, along unbiased directions.

    D_theta = dG/dtheta,    D_v = d2G/dtheta2 v + dF/dtheta,    D_lam = d2G/dlam dtheta v + dF/dlam.

    Dagreou et al. 2022, algorithm 1 with the directions of their section 2, each on one batch.
    """

    def update(self) -> None:
        gradient, hessian, mixed = self.products(self.v, self.draw(self.problem.num_inner))
        in_theta, in_lam = self.outer_gradients(self.theta, self.draw(self.problem.num_outer))
        self.move(gradient, hessian + in_theta, mixed + in_lam)

    def move(self, in_theta: Tensor, in_v: Tensor, in_lam: Tensor) -> None:
        self.theta = self.theta - self.step * in_theta
        self.v = self.v - self.step * in_v
        self.lam = self.lam - self.outer_step * in_lam


class SABA(SOBA):
    """SOBA whose five estimates are variance reduced in the manner of SAGA.

    estimate = new value of a batch - its value in the memory + mean of the memory.

    The samples are split into batches once, and the memory has one entry a batch; its first pass over all batches is
    counted. Dagreou et al. 2022, the SABA directions of their section 2.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        inner, outer = (torch.randperm(n, generator=self.generator) for n in self._sizes())
        self.inner_batches, self.outer_batches = inner.split(self.batch), outer.split(self.batch)
        self.inner_memory = _Memory([self.products(self.v, index) for index in self.inner_batches])
        self.outer_memory = _Memory([self.outer_gradients(self.theta, index) for index in self.outer_batches])

    def _sizes(self) -> list[int]:
        """Sizes that batches divide: what is left over is not used."""
        return [n - n % self.batch for n in (self.problem.num_inner, self.problem.num_outer)]

    def update(self) -> None:
        i, j = (
            int(torch.randint(len(b), (), generator=self.generator)) for b in (self.inner_batches, self.outer_batches)
        )
        gradient, hessian, mixed = self.inner_memory.replace(i, self.products(self.v, self.inner_batches[i]))
        in_theta, in_lam = self.outer_memory.replace(j, self.outer_gradients(self.theta, self.outer_batches[j]))
        self.move(gradient, hessian + in_theta, mixed + in_lam)

    def _choose(self, batches: Sequence[Tensor]) -> int:
        return int(torch.randint(len(batches), (), generator=self.generator))


class _Memory:
    """The last values of each batch, and their means."""

    def __init__(self, values: list) -> None:
        self.tables = [torch.stack(column) for column in zip(*values, strict=True)]
        self.means = [table.mean(0) for table in self.tables]

    def replace(self, row: int, values) -> list[Tensor]:
        """Return the variance-reduced estimates, and store the values."""
        estimates = []
        for table, mean, value in zip(self.tables, self.means, values, strict=True):
            change = value - table[row]
            estimates.append(change + mean)
            mean.add_(change / len(table))
            table[row] = value
        return estimates


class AmIGO(Published):
    """Two inner loops, both started from where they ended.

    theta: T steps of SGD on G.    v: N steps v <- v - step (d2G/dtheta2 v + dF/dtheta), with one batch of F.

    Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization, ICLR 2022, algorithm 1
    with its algorithms 2 and 3 (both SGD); T = N = 10, as in the public benchmark.
    """

    def update(self) -> None:
        self.descend(INNER_STEPS)
        in_theta, in_lam = self.outer_gradients(self.theta, self.draw(self.problem.num_outer))
        for _ in range(INNER_STEPS):
            _, product = self.products(self.v, self.draw(self.problem.num_inner), mixed=False)
            self.v = self.v - self.step * (product + in_theta)
        _, mixed = self.products(self.v, self.draw(self.problem.num_inner), hessian=False)
        self.lam = self.lam - self.outer_step * (mixed + in_lam)


class StocBiO(Published):
    """Inner loop with a warm start, and a truncated Neumann series with a fresh batch for each term.

    v = -step sum_{q < Q} (I - step d2G_q/dtheta2) ... (I - step d2G_1/dtheta2) dF/dtheta.

    Ji, Yang, Liang, Bilevel optimization: convergence analysis and enhanced design, ICML 2021, algorithm 2 with the
    estimator of its algorithm 3; T = Q = 10, as in the public benchmark.
    """

    def update(self) -> None:
        self.descend(INNER_STEPS)
        term, in_lam = self.outer_gradients(self.theta, self.draw(self.problem.num_outer))
        total = term.clone()
        for _ in range(TERMS - 1):
            _, product = self.products(term, self.draw(self.problem.num_inner), mixed=False)
            term = term - self.step * product
            total = total + term
        self.v = -self.step * total
        _, mixed = self.products(self.v, self.draw(self.problem.num_inner), hessian=False)
        self.lam = self.lam - self.outer_step * (mixed + in_lam)


class F2SA(Published):
    """No second derivatives: two copies of the inner variable, and a multiplier gamma that grows by 0.1 a step.

    z -> argmin G,    theta -> argmin F / gamma + G,    D_lam = dF/dlam + gamma (dG/dlam(theta) - dG/dlam(z)).

    Kwon, Kwon, Wright, Nowak, A fully first-order method for stochastic bilevel optimization, ICML 2023, algorithm 1,
    with T = 10 inner steps. The metric is measured at ``z``, which minimises the inner function.
    """

    def __init__(self, *args, multiplier: float = 1.0, growth: float = 0.1, **options) -> None:
        super().__init__(*args, **options)
        self.multiplier, self.growth = multiplier, growth
        self.penalized = self.theta.clone()

    def update(self) -> None:
        self.descend(INNER_STEPS)
        for _ in range(INNER_STEPS):
            inner = self.inner_gradient(self.penalized, self.draw(self.problem.num_inner))
            outer, _ = self.outer_gradients(self.penalized, self.draw(self.problem.num_outer))
            self.penalized = self.penalized - self.step * (inner + outer / self.multiplier)
        _, in_lam = self.outer_gradients(self.penalized, self.draw(self.problem.num_outer))
        index = self.draw(self.problem.num_inner)  # the difference of the two gradients is taken on one batch
        _, above = self._gradients(self.problem.inner, self.penalized, index)
        _, below = self._gradients(self.problem.inner, self.theta, index)
        self.lam = self.lam - self.outer_step * (in_lam + self.multiplier * (above - below))
        self.multiplier += self.growth


METHODS: dict[str, type[Published]] = {"SOBA": SOBA, "SABA": SABA, "AmIGO": AmIGO, "stocBiO": StocBiO, "F2SA": F2SA}
