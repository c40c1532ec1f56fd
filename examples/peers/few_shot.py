"""MAML on unseen letters by nestor, by TorchOpt and by a loop with higher: the same tasks, start and number of steps.

The task is that of `examples/few_shot.py`, 5-way 1-shot on letters of scripts that were not seen, with 16 channels
instead of 32. One meta-update takes three steps on each of four tasks and differentiates through them. All three
libraries start from the same network and see the same tasks. Each searches the rate of the adaptation among the same
three, for every seed, by 60 tasks of the validation scripts; the accuracy is that of 200 tasks of the test scripts.
Meta-tests are adapted by the same code for all.

nestor maps the loss over the four tasks at once (`tasks=4`) and keeps all graphs (`Unrolled(checkpoint="none")`), as
the two others do. The loops with TorchOpt (`MetaSGD`) and with higher take one task after the other. All three
compute the same derivative: the first one agrees to rounding in double precision
(`tests/gallery/test_peer_hypergradients.py`). After that, rounding makes the accuracies differ. Seconds are those of
all three trainings, with their meta-tests.
"""

import copy
from collections.abc import Callable

import higher
import torch
import torch.nn.functional as F
import torchopt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.data.glyphs import glyphs
from shared.experiment import Case, Experiment, main
from shared.search import Trained, tuned
from shared.tasks import Batch, Network, Tasks, accuracy

CHANNELS, STEPS, TASKS, UPDATES, META_RATE, RATES = 16, 3, 4, 80, 3e-3, (0.05, 0.1, 0.2)


def fit(batch: Batch, fast: nn.Module) -> Tensor:
    images, labels = batch
    return F.cross_entropy(fast(images), labels)


def rated(meta: nn.Module, updates: int) -> tuple[Adam, CosineAnnealingLR]:
    optimizer = Adam(meta.parameters(), lr=META_RATE)
    return optimizer, CosineAnnealingLR(optimizer, updates)


def nestor_program(meta: nn.Module, tasks: Tasks, updates: int, rate: float) -> nestor.Program:
    fast, (outer, schedule) = copy.deepcopy(meta), rated(meta, updates)
    episodes = nestor.Episodes(tasks, steps=STEPS)
    return nestor.Program(
        fast=nestor.Problem(fast, fit, data=episodes.support, optimizer=SGD(fast.parameters(), lr=rate),
                            unroll_steps=STEPS, init="meta", tasks=TASKS, response=nestor.Unrolled(checkpoint="none")),
        meta=nestor.Problem(meta, fit, data=episodes.query, optimizer=outer, scheduler=schedule),
    )  # fmt: skip


def by_nestor(meta: nn.Module, tasks: Tasks, updates: int, rate: float) -> None:
    nestor.Engine(nestor_program(meta, tasks, updates, rate), seed=tasks.seed).run(updates * STEPS)


def torchopt_loss(meta: nn.Module, inner: torchopt.MetaSGD, support: Batch, query: Batch) -> Tensor:
    start, state = torchopt.extract_state_dict(meta, by="reference"), torchopt.extract_state_dict(inner, by="reference")
    losses = []
    for *given, images, labels in zip(*support, *query, strict=True):
        for _ in range(STEPS):
            inner.step(fit(given, meta))
        losses.append(fit((images, labels), meta))
        torchopt.recover_state_dict(meta, start)
        torchopt.recover_state_dict(inner, state)
    return torch.stack(losses).mean()


def by_torchopt(meta: nn.Module, tasks: Tasks, updates: int, rate: float) -> None:
    inner, (outer, schedule) = torchopt.MetaSGD(meta, lr=rate), rated(meta, updates)
    for _, (support, query) in zip(range(updates), tasks, strict=False):
        outer.zero_grad()
        torchopt_loss(meta, inner, support, query).backward()
        outer.step()
        schedule.step()


def higher_backward(meta: nn.Module, inner: SGD, support: Batch, query: Batch) -> None:
    for *given, images, labels in zip(*support, *query, strict=True):
        with higher.innerloop_ctx(meta, inner, copy_initial_weights=False) as (fast, steps):
            for _ in range(STEPS):
                steps.step(fit(given, fast))
            (fit((images, labels), fast) / len(support[0])).backward()


def by_higher(meta: nn.Module, tasks: Tasks, updates: int, rate: float) -> None:
    inner, (outer, schedule) = SGD(meta.parameters(), lr=rate), rated(meta, updates)
    for _, (support, query) in zip(range(updates), tasks, strict=False):
        outer.zero_grad()
        higher_backward(meta, inner, support, query)
        outer.step()
        schedule.step()


METHODS = {"nestor": by_nestor, "TorchOpt": by_torchopt, "higher": by_higher}


def adapted(meta: nn.Module, rate: float) -> Callable[[Batch], Callable[[Tensor], Tensor]]:
    def learn(support: Batch) -> Callable[[Tensor], Tensor]:
        fast = copy.deepcopy(meta)
        optimizer = SGD(fast.parameters(), lr=rate)
        for _ in range(STEPS):
            optimizer.zero_grad()
            fit(support, fast).backward()
            optimizer.step()
        return fast

    return learn


def run(case: Case) -> dict[str, float]:
    updates, validations, tests = (3, 5, 5) if case.quick else (UPDATES, 60, 200)
    train, validation, test = (glyphs(case.data, split) for split in ("train", "validation", "test"))
    case.note(updates=updates, tasks=TASKS, steps=STEPS, channels=CHANNELS, meta_rate=META_RATE, rates=RATES)
    for name, meta_train in METHODS.items():

        def trained(rate: float, meta_train=meta_train) -> Trained:
            torch.manual_seed(case.seed)
            meta = Network(channels=CHANNELS)
            meta_train(meta, Tasks(train, TASKS, seed=case.seed), updates, rate)
            learn = adapted(meta, rate)
            return Trained(accuracy(validation, validations, learn), accuracy(test, tests, learn))

        tuned(case, name, RATES, trained)
    return {name: method.metrics["accuracy"] for name, method in case.methods.items()}


def draw(figure: Figure, values: dict[str, float]) -> None:
    axes = figure.subplots()
    axes.barh(list(values), [100 * value for value in values.values()], color="#1b6ca8")
    axes.set(xlabel="accuracy on unseen letters (%)", xlim=(20, 100))


EXPERIMENT = Experiment(
    title="MAML, by nestor, by TorchOpt and by higher",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="nestor",
    baselines=("TorchOpt", "higher"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
