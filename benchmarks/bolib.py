"""``python -m benchmarks.bolib``: nonlinear problems of BOLIB with known optima, from ten starts each.

The definitions and the best known values are those of Zhou, Zemkoho, Tin, BOLIB: Bilevel Optimization LIBrary of test
problems, arXiv 1812.00230, and its version 2 (https://biopt.github.io/bolib). Taken are the problems whose constraints
are intervals for single variables, and whose optimum a grid search confirms (``tests/benchmarks/test_bolib.py``).

Intervals are reparametrised, so that both levels are unconstrained:

    [a, b]: v = (a + b) / 2 + (b - a) / 2 sin(s),      [a, inf): v = a + s^2,      free: v = c + h s.

At a bound where the slope of the lower loss is not zero, its second derivative in ``s`` is positive and the mixed
derivative is zero: the derivative of the best response is then zero, as it should be.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import nestor
from benchmarks.report import machine

STARTS = 10
UPPER_STEPS, LOWER_STEPS = 100, 10
UPPER_RATE = 0.1
MOMENTUM = 0.9
TOLERANCE = 0.01

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Box:
    """The same interval for every variable of a level; called with ``s``, it returns the variables.

    Attributes:
        low, high: The interval that starts are drawn from.
        kind: ``"interval"``: the variables stay within; ``"above"``: they stay above ``low``; ``"free"``.
        dim: Number of variables.
        search: The interval of the grid search; by default ``(low, high)``.
    """

    low: float
    high: float
    kind: str = "interval"
    dim: int = 1
    search: tuple[float, float] | None = None

    def __call__(self, s: Tensor) -> Tensor:
        """Return the variables of the unconstrained ``s``."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        if self.kind == "interval":
            return middle + half * torch.sin(s)
        return self.low + s**2 if self.kind == "above" else middle + half * s

    def start(self, generator: torch.Generator) -> Tensor:
        """Draw ``s`` such that the variables are uniform in the inner 90 % of the interval."""
        share = 0.05 + 0.9 * torch.rand(self.dim, generator=generator, dtype=torch.float64)
        if self.kind == "interval":
            return torch.asin(2 * share - 1)
        return torch.sqrt(share * (self.high - self.low)) if self.kind == "above" else 2 * share - 1

    def grid(self, count: int) -> Tensor:
        """Return points of a grid over the interval that is searched, one row a point."""
        low, high = self.search or (self.low, self.high)
        axis = torch.linspace(low, high, count, dtype=torch.float64)
        return torch.cartesian_prod(*[axis] * self.dim).reshape(-1, self.dim)


@dataclass(frozen=True)
class Problem:
    """A problem of BOLIB: ``min_x F(x, y)`` with ``y`` in ``argmin_y f(x, y)``.

    Attributes:
        name: Its name there: authors, year and number of the source.
        upper, lower: ``F`` and ``f``; the last dimension of both arguments is that of the variables.
        x, y: Where the variables are.
        best: ``F`` and ``f`` at the optimum.
        at: An optimum: the variables of ``x``, then those of ``y``.
        kind: ``smooth`` (one lower minimum, a smooth function of ``x``), ``bound`` (it has kinks, or lies at a bound),
            ``nonconvex`` (several local lower minima), or ``jump`` (the optimum is at a jump or at a point where every
            ``y`` is a lower minimum).
        listed: ``F`` in the library's table where it is another.
        note: What makes the problem hard.
    """

    name: str
    upper: Function
    lower: Function
    x: Box
    y: Box
    best: tuple[float, float]
    at: tuple[float, ...]
    kind: str
    listed: float | None = None
    note: str = ""


def scalar(function: Function) -> Function:
    """Make a function of numbers one of vectors with one entry."""
    return lambda x, y: function(x[..., 0], y[..., 0])


def _two(name: str, upper: Function, lower: Function, x: Box, y: Box, *rest: Any, **options: Any) -> Problem:
    return Problem(name, scalar(upper), scalar(lower), x, y, *rest, **options)


_UNIT, _SIGNED = Box(0.0, 1.0), Box(-1.0, 1.0)
_ROOTS = torch.arange(1, 11, dtype=torch.float64).sqrt()


def _quartic(x: Tensor, y: Tensor) -> Tensor:
    return 16 * y**4 + 2 * y**3 - 8 * y**2 - 1.5 * y + 0.5


def _griewank(y: Tensor) -> Tensor:
    return 1 + (y**2).sum(-1) / 4000 - torch.cos(y / _ROOTS).prod(-1)


def _mitsos_barton_21(x: Tensor, y: Tensor) -> Tensor:
    linear = 0.004 * x**3 - 0.036 * x**2 + 0.08 * x
    return y**4 + 4 / 30 * (1 - x) * y**3 + (-0.02 * x**2 + 0.16 * x - 0.4) * y**2 + linear * y


PROBLEMS = (
    _two(
        "DempeEtal2012",
        lambda x, y: x + 0 * y,
        lambda x, y: x * y,
        _SIGNED,
        _UNIT,
        (-1.0, -1.0),
        (-1.0, 1.0),
        "bound",
        note="F does not read y: the lower level does not matter.",
    ),
    Problem(
        "DeSilva1978",
        lambda x, y: ((x - 1) ** 2).sum(-1) + (y**2).sum(-1) - 2,
        lambda x, y: ((y - x) ** 2).sum(-1),
        Box(0.0, 2.0, "free", 2),
        Box(0.5, 1.5, dim=2),
        (-1.0, 0.0),
        (0.5, 0.5, 0.5, 0.5),
        "bound",
        note="The optimum is the kink where y = x reaches its bound; there the second derivative in s is zero.",
    ),
    Problem(
        "FalkLiu1995",
        lambda x, y: ((x - 1.5) ** 2).sum(-1) + (y**2).sum(-1) - 4.5,
        lambda x, y: ((y - x) ** 2).sum(-1),
        Box(0.0, 2.0, "free", 2),
        Box(0.5, 1.5, dim=2),
        (-2.25, 0.0),
        (0.75, 0.75, 0.75, 0.75),
        "smooth",
        listed=-2.1962,
    ),
    _two(
        "GumusFloudas2001Ex4",
        lambda x, y: (x - 3) ** 2 + (y - 2) ** 2,
        lambda x, y: (y - 5) ** 2 + 0 * x,
        Box(2.0, 4.0),
        Box(0.0, 10.0),
        (9.0, 0.0),
        (3.0, 5.0),
        "smooth",
        note="Its upper constraints on x and y say 2 <= x <= 4, since y = 5 always.",
    ),
    Problem(
        "HatzEtal2013",
        lambda x, y: -x[..., 0] + 2 * y[..., 0] + y[..., 1],
        lambda x, y: (x[..., 0] - y[..., 0]) ** 2 + y[..., 1] ** 2,
        Box(-1.0, 2.0, "free"),
        Box(0.0, 2.0, "above", 2),
        (0.0, 0.0),
        (0.0, 0.0, 0.0),
        "bound",
        note="F is |x| along the best response, and the second derivatives in s are zero at the optimum.",
    ),
    _two(
        "HendersonQuandt1958",
        lambda x, y: (0.5 * (x + y) - 95) * x,
        lambda x, y: (y + 0.5 * x - 100) * y,
        Box(0.0, 200.0),
        Box(0.0, 100.0, "above"),
        (-3266.667, -711.111),
        (93.3333, 26.6667),
        "smooth",
        note="T1T2, with the scale 1 for second derivatives far from one, goes to the wrong end of the interval.",
    ),
    _two(
        "HenrionSurowiec2011",
        lambda x, y: x**2 + 0 * y,
        lambda x, y: 0.5 * y**2 - x * y,
        Box(-2.0, 2.0, "free"),
        Box(-2.0, 2.0, "free"),
        (0.0, 0.0),
        (0.0, 0.0),
        "smooth",
    ),
    _two(
        "KleniatiAdjiman2014Ex3",
        lambda x, y: x - y,
        lambda x, y: x * y**2 / 2 - x * y**3,
        _SIGNED,
        _SIGNED,
        (-1.0, 0.0),
        (0.0, 1.0),
        "jump",
        note="f is zero for all y at x = 0; for x > 0 the best response is y = 1 and y = 0 is a local minimum.",
    ),
    _two(
        "LamparielloSagratella2017Ex32",
        lambda x, y: x**2 + y**2,
        lambda x, y: (x + y - 1) ** 2,
        Box(-2.0, 2.0, "free"),
        Box(-2.0, 2.0, "free", search=(-3.0, 3.0)),
        (0.5, 0.0),
        (0.5, 0.5),
        "smooth",
    ),
    _two(
        "LucchettiEtal1987",
        lambda x, y: (1 - x) / 2 + x * y,
        lambda x, y: (x - 1) * y,
        _UNIT,
        _UNIT,
        (0.0, 0.0),
        (1.0, 0.0),
        "jump",
        note="Every y is a lower minimum at x = 1, the optimum; before it y = 1, and F falls towards x = 0.",
    ),
    _two(
        "MacalHurter1997",
        lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y,
        Box(0.0, 20.0, "free", search=(9.5, 10.5)),
        Box(-500.0, 500.0, "free", search=(-30.0, 30.0)),
        (81.3279, -0.33599),
        (10.0163, 0.8197),
        "smooth",
        note="F has a curvature of 5,000 in x: 1 % of F is 0.018 in x. Some runs end just outside.",
    ),
    _two(
        "Mirrlees1999",
        lambda x, y: (x - 2) ** 2 + (y - 1) ** 2,
        lambda x, y: -x * torch.exp(-((y + 1) ** 2)) - torch.exp(-((y - 1) ** 2)),
        Box(0.0, 3.0, "free", search=(0.0, 4.0)),
        Box(-2.0, 2.0),
        (1.00180, -1.01987),
        (1.0, 0.95753),
        "nonconvex",
        note="At x = 1 the global lower minimum jumps from y near 1 to y near -1.",
    ),
    _two(
        "MitsosBarton2006Ex310",
        lambda x, y: y + 0 * x,
        lambda x, y: x * _quartic(x, y),
        Box(0.1, 1.0),
        _SIGNED,
        (0.5, -0.1),
        (0.1, 0.5),
        "nonconvex",
        note="The lower level has a second, higher minimum at y = -0.5. All x are optimal, with f = -x.",
    ),
    _two(
        "MitsosBarton2006Ex311",
        lambda x, y: y + 0 * x,
        lambda x, y: x * _quartic(x, y),
        _SIGNED,
        Box(-0.8, 1.0),
        (-0.8, 0.0),
        (0.0, -0.8),
        "jump",
        note="f is zero for all y at x = 0, the optimum.",
    ),
    _two(
        "MitsosBarton2006Ex312",
        lambda x, y: -x + x * y + 10 * y**2,
        lambda x, y: -x * y**2 + 0.5 * y**4,
        _SIGNED,
        _SIGNED,
        (0.0, 0.0),
        (0.0, 0.0),
        "nonconvex",
        note="The lower minimum splits at x = 0, the optimum, where the second derivative is zero.",
    ),
    _two(
        "MitsosBarton2006Ex313",
        lambda x, y: x - y,
        lambda x, y: x * y * (y / 2 - x**2),
        _SIGNED,
        _SIGNED,
        (-1.0, 0.0),
        (0.0, 1.0),
        "jump",
        note="f is zero for all y at x = 0, the optimum.",
    ),
    _two(
        "MitsosBarton2006Ex314",
        lambda x, y: (x - 0.25) ** 2 + y**2,
        lambda x, y: y**3 / 3 - x * y,
        _SIGNED,
        _SIGNED,
        (0.25, -1 / 12),
        (0.25, 0.5),
        "nonconvex",
        note="At x = 0.25 the global lower minimum jumps from y = 0.5 to y = -1, with which F has a minimum there.",
    ),
    _two(
        "MitsosBarton2006Ex315",
        lambda x, y: x + y,
        lambda x, y: x * y**2 / 2 - y**3 / 3,
        _SIGNED,
        _SIGNED,
        (0.0, -5 / 6),
        (-1.0, 1.0),
        "nonconvex",
        note="For x < 0 the lower level has a second, higher minimum, y = x.",
    ),
    _two(
        "MitsosBarton2006Ex316",
        lambda x, y: 2 * x + y,
        lambda x, y: -x * y**2 / 2 - y**4 / 4,
        _SIGNED,
        _SIGNED,
        (-2.0, 0.0),
        (-1.0, 0.0),
        "nonconvex",
        note="Local lower minima at y = -1, 0 and 1; a second optimum is at x = -0.5, y = -1.",
    ),
    _two(
        "MitsosBarton2006Ex317",
        lambda x, y: (x + 0.5) ** 2 + y**2 / 2,
        lambda x, y: x * y**2 / 2 + y**4 / 4,
        _SIGNED,
        _SIGNED,
        (0.1875, -1 / 64),
        (-0.25, 0.5),
        "nonconvex",
        note="Two equal lower minima, y = sqrt(-x) and -sqrt(-x), lead to the same F.",
    ),
    _two(
        "MitsosBarton2006Ex318",
        lambda x, y: -(x**2) + y**2,
        lambda x, y: x * y**2 - y**4 / 2,
        _SIGNED,
        _SIGNED,
        (-1.0, 0.0),
        (1.0, 0.0),
        "nonconvex",
        listed=-0.25,
        note="For 0 < x < 1 lower minima at y = 0 and at both bounds; with those at the bounds F is zero at best.",
    ),
    _two(
        "MitsosBarton2006Ex319",
        lambda x, y: (x - 1 + y / 2) * y,
        lambda x, y: (-x + y**2 / 2) * y**2,
        _SIGNED,
        _SIGNED,
        (-0.258, -0.0178),
        (0.189, 0.4343),
        "nonconvex",
        note="Two equal lower minima, sqrt(x) and -sqrt(x); only the first leads to the optimum. For x < 0, F is zero.",
    ),
    _two(
        "MitsosBarton2006Ex320",
        lambda x, y: (x - 0.25) ** 2 + y**2,
        lambda x, y: y**3 / 3 - x**2 * y,
        _SIGNED,
        _SIGNED,
        (0.3125, -1 / 12),
        (0.5, 0.5),
        "nonconvex",
        note="For |x| < 0.5 the global lower minimum is y = -1, with which F has a minimum of 1 at x = 0.25.",
    ),
    _two(
        "MitsosBarton2006Ex321",
        lambda x, y: (x + 0.6) ** 2 + y**2,
        _mitsos_barton_21,
        _SIGNED,
        _SIGNED,
        (0.2095, -0.0656),
        (-0.5545, 0.4554),
        "nonconvex",
        note="Two lower minima, one near y = -0.5 and one near 0.5.",
    ),
    _two(
        "MitsosBarton2006Ex324",
        lambda x, y: x**2 - y,
        lambda x, y: ((y - 1 - 0.1 * x) ** 2 - 0.5 - 0.5 * x) ** 2,
        _UNIT,
        Box(0.0, 3.0),
        (-1.755, 0.0),
        (0.2106, 1.799),
        "nonconvex",
        note="Two equal lower minima; only the upper one leads to the optimum.",
    ),
    _two(
        "MorganPatrone2006a",
        lambda x, y: -(x + y),
        lambda x, y: x * y,
        Box(-0.5, 0.5),
        _SIGNED,
        (-1.0, 0.0),
        (0.0, 1.0),
        "jump",
        note="F falls towards x = 0 from the left; beyond it the best response jumps from 1 to -1.",
    ),
    Problem(
        "SinhaMaloDeb2014TP9",
        lambda x, y: ((x - 1) ** 2).sum(-1) + (y**2).sum(-1),
        lambda x, y: torch.exp(_griewank(y) * (x**2).sum(-1)),
        Box(-1.0, 2.0, "free", 10),
        Box(-math.pi, math.pi, dim=10),
        (0.0, 1.0),
        (1.0,) * 10 + (0.0,) * 10,
        "nonconvex",
        note="20 variables; many lower minima; f grows like an exponential of |x|^2.",
    ),
    Problem(
        "SinhaMaloDeb2014TP10",
        lambda x, y: ((x - 1) ** 2).sum(-1) + (y**2).sum(-1),
        lambda x, y: torch.exp(_griewank(x * y)),
        Box(-1.0, 2.0, "free", 10),
        Box(-math.pi, math.pi, dim=10),
        (0.0, 1.0),
        (1.0,) * 10 + (0.0,) * 10,
        "nonconvex",
        note="20 variables; many lower minima; f does not depend on y_i at x_i = 0.",
    ),
    _two(
        "Yezza1996Ex31",
        lambda x, y: -(4 * x - 3) * y + 2 * x + 1,
        lambda x, y: -(1 - 4 * x) * y - 2 * x - 2,
        _UNIT,
        _UNIT,
        (1.5, -2.5),
        (0.25, 0.0),
        "jump",
        note="F falls towards x = 0.25 from the right; before it the best response jumps from 0 to 1.",
    ),
)

# Of the lower learning rate.
METHODS: dict[str, Callable[[float], nestor.Response]] = {
    "T1T2": lambda rate: nestor.T1T2(),
    "T1T2, scaled": lambda rate: nestor.T1T2(scale=rate),
    "FiniteDifference": lambda rate: nestor.FiniteDifference(),
    "ConjugateGradient": lambda rate: nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=20, rtol=1e-8)),
    "DenseSolve": lambda rate: nestor.Implicit(solver=nestor.DenseSolve()),
    "Unrolled": lambda rate: nestor.Unrolled(),
}


def least_lower(problem: Problem, x: Tensor, count: int = 2001) -> float:
    """Return the least lower value at ``x`` on a grid; of the two problems with ten variables it is known."""
    if problem.y.dim > 2:
        return problem.best[1]
    points = problem.y.grid(count if problem.y.dim == 1 else 201)
    return float(problem.lower(x.expand(len(points), -1), points).min())


def lower_rate(problem: Problem) -> float:
    """Return one over the largest curvature of the lower loss, in ``s``, at 200 random points."""
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([problem.x.start(generator) for _ in range(200)])
    y = torch.stack([problem.y.start(generator) for _ in range(200)])
    loss = lambda s, t: problem.lower(problem.x(t), problem.y(s))  # noqa: E731
    hessians = torch.func.vmap(torch.func.hessian(loss))(y, x)
    return 1 / float(torch.linalg.eigvalsh(hessians).abs().max())


def make_program(
    problem: Problem, response: nestor.Response, seed: int, rate: float, upper_steps: int = UPPER_STEPS
) -> nestor.Program:
    """Return the program at a random start: momentum below, Adam with a cosine schedule above."""
    generator = torch.Generator().manual_seed(seed)
    upper_s, lower_s = (nestor.Variable(box.start(generator)) for box in (problem.x, problem.y))

    def lower_loss(lower: nn.Module, upper: nn.Module) -> Tensor:
        return problem.lower(problem.x(upper()), problem.y(lower()))

    def upper_loss(upper: nn.Module, lower: nn.Module) -> Tensor:
        return problem.upper(problem.x(upper()), problem.y(lower()))

    adam = torch.optim.Adam(upper_s.parameters(), lr=UPPER_RATE, betas=(0.9, 0.95))
    return nestor.Program(
        lower=nestor.Problem(
            lower_s,
            lower_loss,
            optimizer=torch.optim.SGD(lower_s.parameters(), lr=rate, momentum=MOMENTUM),
            unroll_steps=LOWER_STEPS,
            response=response,
        ),
        upper=nestor.Problem(
            upper_s,
            upper_loss,
            optimizer=adam,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(adam, upper_steps),
        ),
    )


@dataclass
class Outcome:
    """Where a run ended.

    Attributes:
        upper, lower: ``F`` and ``f``.
        gap: ``f`` above its global minimum at this ``x``.
        evaluations: Gradients, Hessian products and pullbacks.
        seconds: Of the run.
        error: The name of the error that ended it.
        x, y: The variables, where there is one of each.
    """

    upper: float
    lower: float
    gap: float
    evaluations: int
    seconds: float
    error: str = ""
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def verdict(self, problem: Problem) -> str:
        """Say whether ``F`` is that of the optimum, and ``f`` the global minimum at this ``x``: within one percent."""
        if self.error:
            return "error"
        if not self.gap <= TOLERANCE * max(0.1, abs(problem.best[1])):
            return "local"
        close = abs(self.upper - problem.best[0]) <= TOLERANCE * max(1.0, abs(problem.best[0]))
        return "found" if close else "elsewhere"


def solve(problem: Problem, method: str, seed: int, rate: float, upper_steps: int = UPPER_STEPS) -> Outcome:
    """Run a method from one start."""
    program = make_program(problem, METHODS[method](rate), seed, rate, upper_steps)
    error, begin = "", time.perf_counter()
    with warnings.catch_warnings(), nestor.diagnostics.count_evaluations(program) as count:
        warnings.simplefilter("ignore", nestor.NestorWarning)
        try:
            nestor.Engine(program, seed=seed, check=False).run(upper_steps * LOWER_STEPS)
        except nestor.NestorError as raised:
            error = type(raised).__name__
    seconds = time.perf_counter() - begin
    x, y = (
        box(program.levels[name].parameters[0].detach()) for name, box in (("upper", problem.x), ("lower", problem.y))
    )
    upper, lower = float(problem.upper(x, y)), float(problem.lower(x, y))
    return Outcome(
        upper=_rounded(upper),
        lower=_rounded(lower),
        gap=_rounded(lower - least_lower(problem, x)),
        evaluations=sum(counter.total() for counter in (count.gradients, count.hvps, count.responses)),
        seconds=round(seconds, 3),
        error=error,
        x=[_rounded(v) for v in x.tolist()],
        y=[_rounded(v) for v in y.tolist()],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


class Results:
    """The outcomes in a JSON file, by problem and method."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.about: dict[str, Any] = content.get("about") or machine([], 1)
        self.runs = {key: [Outcome(**run) for run in runs] for key, runs in content.get("runs", {}).items()}

    def write(self) -> None:
        lines = ",\n".join(
            f"{json.dumps(key)}: {json.dumps([vars(run) for run in runs])}" for key, runs in self.runs.items()
        )
        temporary = self.path.with_suffix(".part")
        temporary.write_text(f'{{"about": {json.dumps(self.about)},\n"runs": {{\n{lines}\n}}}}\n', encoding="utf-8")
        temporary.replace(self.path)

    def carry_out(self, starts: int, upper_steps: int) -> Iterator[str]:
        """Run what is not there; yield what was done."""
        for problem in PROBLEMS:
            rate = lower_rate(problem)
            for method in METHODS:
                key = f"{problem.name} | {method}"
                if key not in self.runs:
                    self.runs[key] = [solve(problem, method, seed, rate, upper_steps) for seed in range(starts)]
                    self.write()
                    yield f"{key}: {self.count(problem, method, 'found')} of {starts}"

    def count(self, problem: Problem, method: str, verdict: str) -> int:
        return sum(run.verdict(problem) == verdict for run in self.runs.get(f"{problem.name} | {method}", []))


HEAD = """\
# BOLIB: nonlinear bilevel problems with known optima

```sh
python -m benchmarks.bolib --quick             # does it run? seconds
python -m benchmarks.bolib --out docs          # what is not yet in docs/bolib.json, then this page
python -m benchmarks.bolib --out docs --draw   # this page from docs/bolib.json
```

{problems} problems of BOLIB (Zhou, Zemkoho, Tin, Bilevel Optimization LIBrary of test problems, arXiv 1812.00230, and
its version 2), whose constraints are intervals for single variables. The test `tests/benchmarks/test_bolib.py` finds
each optimum by a grid search over both levels; of the two problems with 20 variables it checks that `F` and `f` are at
their lower bounds.

- Optima are *optimistic*: among several lower minima, the one with the least `F` counts.
- Intervals are reparametrised, `y = middle + half sin(s)`, half-lines by `y = low + s^2`; both levels are then
  unconstrained. At a bound with a slope the best response has derivative zero, in every method.
- {starts} random starts, {upper} upper steps (Adam, rate {rate:g}, betas 0.9 and 0.95, cosine schedule), {lower}
  lower steps between two of them (SGD, momentum 0.9, rate one over the largest curvature at 200 random points). All
  problems have the same settings: nothing is tuned.
- `T1T2` has the scale 1; `T1T2, scaled` has the lower learning rate, which makes it the gradient through one step.
- *Found*: `F` is within 1 % of the optimum (0.01 where `|F*|` is below 1), and `f` is within 1 % of `|f*|` of its
  *global* minimum at this `x` (0.001 where `|f*|` is below 0.1).
  *Local*: `f` is above that minimum, so the point is not feasible. *Elsewhere*: the point is feasible, and `F` is
  another. *Error*: nestor raised one.
"""

LEFT_OUT = """\
## What is left out

Problems with constraints that couple variables or levels (most of the library), with piecewise losses or fractional
powers of numbers that may be negative (LuDebSinha2016a to c, MorganPatrone2006b and c), with an unknown optimum, and
the linear and simple ones. BOLIB lists other optima for FalkLiu1995 (-2.1962) and MitsosBarton2006Ex318 (-0.25) than
the grid search finds (-2.25 and -1).
"""

REASONS = {
    "smooth": "One lower minimum that depends smoothly on `x`.",
    "bound": "The best response has kinks, or the optimum lies at a bound.",
    "nonconvex": "Several local lower minima.",
    "jump": "At the optimum the best response jumps, or every `y` is a lower minimum.",
}


def page(results: Results) -> str:
    """Return the page."""
    about = results.about
    starts = len(next(iter(results.runs.values())))
    head = HEAD.format(problems=len(PROBLEMS), starts=starts, upper=UPPER_STEPS, lower=LOWER_STEPS, rate=UPPER_RATE)
    parts = [
        head,
        f"Measured on {about['processor']}, {about['threads']} thread, torch {about['torch']}.\n",
        "## Found optima\n",
        "\n".join(summary(results)) + "\n",
        "## By problem\n",
        f"Optima found of {starts} starts; in brackets the other ends: l local, e elsewhere, ! error.\n",
        "\n".join(found_table(results)) + "\n",
        "## Upper values reached, and evaluations\n",
        "Medians over the starts. A value below `F*` belongs to a lower variable that is not a global minimum.\n",
        "\n".join(value_table(results)) + "\n",
        "## What makes a problem hard\n",
        "\n".join(f"- **{problem.name}**: {problem.note}" for problem in PROBLEMS if problem.note) + "\n",
        READING,
        LEFT_OUT,
    ]
    return "\n".join(parts)


READING = """\
## How to read it

- **One lower minimum, smooth.** `ConjugateGradient` and `DenseSolve` find the optimum from nearly every start. `T1T2`
  and `FiniteDifference` find it where the indirect term does not matter, or is nearly all that matters
  (MacalHurter1997); elsewhere their direction vanishes at another point, and the scale decides which. `Unrolled`
  differentiates the last ten steps: where the lower level is slow (FalkLiu1995) that is a truncated series.
- **Several lower minima.** A response is that of the minimum that the lower level is in. Where the start lies decides;
  no method of nestor looks for the global one. Ends that beat `F*` are not feasible.
- **Jumps, and optima at which every `y` is a lower minimum.** The optimum is a limit of descent from one side at best.
  Beyond it the best response is another one, with another `F`; where `f` does not depend on `y`, the optimistic choice
  of `y` is made by the upper level in the definition, and by nobody in a descent.
- **Errors.** In all of these runs `ConjugateGradient` raised `SingularError` at a second derivative that is indefinite
  and regular, where its documentation promises a truncated solve; `DenseSolve` and `MINRES` solve such systems.
"""


def summary(results: Results) -> list[str]:
    """Return the table of shares of found optima, by kind of problem."""
    lines = [_row(["kind", "problems", *METHODS]), _row(["---"] * (2 + len(METHODS)))]
    for kind, reason in REASONS.items():
        problems = [problem for problem in PROBLEMS if problem.kind == kind]
        shares = []
        for method in METHODS:
            runs = [(p, run) for p in problems for run in results.runs[f"{p.name} | {method}"]]
            shares.append(f"{sum(run.verdict(p) == 'found' for p, run in runs) / len(runs):.0%}")
        lines.append(_row([f"{kind}: {reason}", str(len(problems)), *shares]))
    return lines


def found_table(results: Results) -> list[str]:
    """Return the table of counts of found optima."""
    lines = [_row(["problem", "kind", "F*", "f*", *METHODS]), _row(["---"] * (4 + len(METHODS)))]
    for problem in PROBLEMS:
        cells = []
        for method in METHODS:
            letters = {"local": "l", "elsewhere": "e", "error": "!"}
            others = [(results.count(problem, method, verdict), letter) for verdict, letter in letters.items()]
            rest = " ".join(f"{number}{letter}" for number, letter in others if number)
            cells.append(f"{results.count(problem, method, 'found')}{f' ({rest})' if rest else ''}")
        lines.append(_row([problem.name, problem.kind, f"{problem.best[0]:.5g}", f"{problem.best[1]:.4g}", *cells]))
    return lines


def value_table(results: Results) -> list[str]:
    """Return the table of median upper values and evaluations."""
    lines = [_row(["problem", "F*", *METHODS]), _row(["---"] * (2 + len(METHODS)))]
    for problem in PROBLEMS:
        values = [f"{_median(results, problem, method, 'upper'):.4g}" for method in METHODS]
        lines.append(_row([problem.name, f"{problem.best[0]:.5g}", *values]))
    evaluations = [
        f"{statistics.median(_median(results, problem, method, 'evaluations') for problem in PROBLEMS):,.0f}"
        for method in METHODS
    ]
    seconds = [f"{statistics.median(_median(results, p, m, 'seconds') for p in PROBLEMS):.2f}" for m in METHODS]
    lines.append(_row(["*evaluations of a run*", "", *evaluations]))
    lines.append(_row(["*seconds of a run*", "", *seconds]))
    return lines


def _median(results: Results, problem: Problem, method: str, what: str) -> float:
    return statistics.median(getattr(run, what) for run in results.runs[f"{problem.name} | {method}"])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bolib", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two starts: does it run?")
    parser.add_argument("--draw", action="store_true", help="no runs: only the page, from the JSON file")
    parser.add_argument("--out", type=Path, default=Path("runs/bolib"), help="folder of bolib.json and bolib.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / ("bolib-quick.json" if options.quick else "bolib.json"))
    if not options.draw:
        for done in results.carry_out(*((1, 5) if options.quick else (STARTS, UPPER_STEPS))):
            console.print(done)
    results.path.with_suffix(".md").write_text(page(results), encoding="utf-8")
    console.print(f"wrote {results.path} and the page beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
