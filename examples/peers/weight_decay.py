"""A weight decay for each column of a logistic regression, by nestor and by Betty.

The model reads the features of a person (Adult) and 100 columns of noise. The lower level trains the weights on 500
rows. The upper level learns the logarithms of the decays of all columns from the loss of the trained weights on 500
other rows, and a normal prior of deviation 1 around the start, the best single decay. There are 100 upper steps, one
after every ten lower steps of Adam.

Each library searches the rate of the decays among the same three, for every seed, by the loss on 500 further rows. A
model trained to its minimum on the 1,000 rows of both levels, with the decays found, gives `loss` and `accuracy` on
the 16,281 test rows. The best single decay of a grid of five is chosen and judged in the same way.

The methods are pairs: conjugate gradients with five iterations, a Neumann series of ten terms, and the identity for
the inverse Hessian, which nestor's default multiplies exactly (`T1T2`) and Betty by a central difference ("darts").
The hypergradients of the last two pairs agree to rounding; those by conjugate gradients do not, because Betty 0.2.1
computes its second and all further directions from the residual before (`tests/gallery/test_peer_hypergradients.py`
compares all of them in double precision). Seconds are those of all three trainings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from betty.configs import Config
from torch import Tensor
from torch.optim import Adam

import nestor
from shared.bars import bars
from shared.betty_levels import BettyLevel, run_betty
from shared.census import census
from shared.convex import minimum
from shared.experiment import Case, Experiment, main
from shared.search import Trained, tuned

ROWS, STEPS, UNROLL, LOWER_RATE, RATES = 500, 100, 10, 0.02, (0.03, 0.1, 0.3)
NOISE, GRID, TERMS, SERIES_STEP = 100, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), 10, 0.1
RESPONSES = {
    "nestor, conjugate gradients": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5, rtol=0.0)),
    "nestor, Neumann": nestor.Implicit(solver=nestor.Neumann(num_terms=TERMS, step_size=SERIES_STEP)),
    "nestor, T1T2": nestor.T1T2(),
}
CONFIGS = {
    "Betty, conjugate gradients": Config("cg", UNROLL, cg_iterations=5),
    "Betty, Neumann": Config("neumann", UNROLL, neumann_iterations=TERMS - 1, neumann_alpha=SERIES_STEP),
    "Betty, finite differences": Config("darts", UNROLL),
}
Rows = tuple[Tensor, Tensor]


def loss_on(rows: Rows, weights: Tensor) -> Tensor:
    inputs, labels = rows
    return F.binary_cross_entropy_with_logits(inputs @ weights, labels)


@dataclass(frozen=True)
class Task:
    train: Rows
    guide: Rows
    decay: float  # the start

    def weights_loss(self, batch, weights, logs) -> Tensor:  # lower level
        return loss_on(batch, weights()) + 0.5 * (logs().exp() * weights()[1:].square()).sum()

    def logs_loss(self, batch, logs, weights) -> Tensor:  # upper level
        return loss_on(batch, weights()) + (logs() - math.log(self.decay)).square().sum() / (2 * len(self.guide[1]))

    def start(self) -> tuple[nestor.Variable, nestor.Variable]:
        logs = self.equal(self.decay)
        return nestor.Variable(self.solved(logs, self.train)), nestor.Variable(logs)

    def equal(self, decay: float) -> Tensor:
        return torch.full_like(self.train[0][0, 1:], math.log(decay))

    def solved(self, logs: Tensor, rows: Rows) -> Tensor:
        return minimum(lambda w: self.weights_loss(rows, lambda: w, lambda: logs), torch.zeros_like(rows[0][0]), 100)


def nestor_program(task: Task, response: nestor.Response, rate: float) -> nestor.Program:
    weights, logs = task.start()
    return nestor.Program(
        weights=nestor.Problem(weights, task.weights_loss, data=[task.train], unroll_steps=UNROLL, response=response,
                               optimizer=Adam(weights.parameters(), lr=LOWER_RATE)),
        logs=nestor.Problem(logs, task.logs_loss, data=[task.guide], optimizer=Adam(logs.parameters(), lr=rate)),
    )  # fmt: skip


def betty_levels(task: Task, config: Config, rate: float) -> list[BettyLevel]:
    weights, logs = task.start()
    lower, upper = Adam(weights.parameters(), lr=LOWER_RATE), Adam(logs.parameters(), lr=rate)
    return [
        BettyLevel("weights", weights, task.weights_loss, data=[task.train], optimizer=lower, config=config),
        BettyLevel("logs", logs, task.logs_loss, data=[task.guide], optimizer=upper, config=Config(retain_graph=True)),
    ]


def by_nestor(task: Task, response: nestor.Response, rate: float, steps: int) -> Tensor:
    program = nestor_program(task, response, rate)
    nestor.Engine(program, seed=0).run(steps)
    return program.levels["logs"].problem.module().detach()


def by_betty(task: Task, config: Config, rate: float, steps: int) -> Tensor:
    levels = betty_levels(task, config, rate)
    run_betty(levels, steps, seed=0)
    return levels[1].module().detach()


def run(case: Case) -> dict[str, float]:
    rows, steps = (100, 3 * UNROLL) if case.quick else (ROWS, STEPS * UNROLL)
    data, generator = census(case.data, case.seed, 3 * rows), torch.Generator().manual_seed(case.seed)

    def columns(inputs: Tensor) -> Tensor:  # a column of ones, the features, noise
        noise = torch.randn(len(inputs), NOISE, generator=generator)
        return torch.cat([inputs[:, :1], inputs[:, 1:][:, data.single], noise], 1)

    train, guide, validation = zip(columns(data.train).split(rows), data.train_labels.split(rows), strict=True)
    both, test = tuple(map(torch.cat, zip(train, guide, strict=True))), (columns(data.test), data.test_labels)
    case.note(rows=rows, lower_steps=steps, unroll=UNROLL, rate=LOWER_RATE, rates=RATES, noise=NOISE, grid=GRID)

    def search(name: str, rates: tuple[float, ...], decays_of: Callable[[float], Tensor]) -> float:
        losses: dict[float, float] = {}

        def trained(rate: float) -> Trained:
            weights = task.solved(decays_of(rate), both)
            losses[rate] = float(loss_on(test, weights))
            right = ((test[0] @ weights > 0) == (test[1] > 0.5)).float().mean()
            return Trained(-float(loss_on(validation, weights)), float(right))

        tuned(case, name, rates, trained)
        case.methods[name].report(loss=losses[rate := case.methods[name].metrics["rate"]])
        return rate

    task = Task(train, guide, GRID[0])
    task = replace(task, decay=search("best single decay", GRID, task.equal))
    for name, response in RESPONSES.items():
        search(name, RATES, lambda rate, response=response: by_nestor(task, response, rate, steps))
    for name, config in CONFIGS.items():
        search(name, RATES, lambda rate, config=config: by_betty(task, config, rate, steps))
    return {name: method.metrics["loss"] for name, method in case.methods.items()}


EXPERIMENT = Experiment("Weight decays, by nestor and by Betty", run, bars("test loss"), metric="loss",
                        ours="nestor, conjugate gradients", baselines=tuple(CONFIGS),
                        higher_is_better=False, percent=False)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
