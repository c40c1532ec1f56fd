"""Meta-Weight-Net by nestor and by Betty: the same task, network, data and number of lower steps.

The task is that of `examples/meta_weight_net.py`, with 1,000 lower steps. Both libraries search the rate of the weight
function among the same three, for every seed, by the accuracy on 1,000 validation images. nestor uses its default
response, the exact `T1T2`, and `FiniteDifference(reuse=True)`; Betty uses the method of its own example of this task,
finite differences ("darts"). The lower loss detaches the losses that the weight function reads. A difference moves them
too, so it is not the derivative of the loss as written; nestor warns of it. Seconds are those of all three trainings.
"""

import logging

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared import noisy_clothes
from shared.batches import Batches
from shared.experiment import Case, Experiment, main
from shared.noisy_clothes import BATCH, NoisyClothes, accuracy, level, plain_loss, small_cnn
from shared.search import Trained, tuned
from shared.weight_functions import WeightFunction

STEPS, NOISE, RATE, RATES = 1_000, 0.4, 0.03, (3e-5, 1e-4, 3e-4)
RESPONSES = {
    "nestor, T1T2": nestor.T1T2(),
    "nestor, FiniteDifference(reuse=True)": nestor.FiniteDifference(reuse=True),
}

logging.disable(logging.INFO)


def weighted_loss(batch, classifier: nn.Module, weight: nn.Module) -> Tensor:
    images, labels = batch
    losses = F.cross_entropy(classifier(images), labels, reduction="none")
    weights = weight(losses.detach())
    return (weights * losses).sum() / weights.sum()


def by_nestor(data: NoisyClothes, seed: int, steps: int, rate: float, response: nestor.Response) -> nn.Module:
    classifier, weight = small_cnn(seed), WeightFunction()
    program = nestor.Program(
        classifier=level(classifier, weighted_loss, data.all_labelled(), steps, rate=RATE, response=response),
        weight=nestor.Problem(weight, plain_loss, data=Batches(*data.guide, size=BATCH),
                              optimizer=Adam(weight.parameters(), lr=rate)),
    )  # fmt: skip
    nestor.Engine(program, seed=seed).run(steps)
    return classifier


def by_betty(data: NoisyClothes, seed: int, steps: int, rate: float) -> nn.Module:
    class Weight(ImplicitProblem):
        def training_step(self, batch) -> Tensor:
            return plain_loss(batch, self.classifier.module)

    class Classifier(ImplicitProblem):
        def training_step(self, batch) -> Tensor:
            return weighted_loss(batch, self.module, self.weight.module)

    classifier, weight = small_cnn(seed), WeightFunction()
    torch.manual_seed(seed)
    optimizer = SGD(classifier.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    upper = Weight(
        "weight",
        Config(),
        module=weight,
        optimizer=Adam(weight.parameters(), lr=rate),
        train_data_loader=Batches(*data.guide, size=BATCH),
    )
    lower = Classifier(
        "classifier",
        Config(type="darts", unroll_steps=1),
        module=classifier,
        optimizer=optimizer,
        scheduler=CosineAnnealingLR(optimizer, steps),
        train_data_loader=Batches(*data.all_labelled(), size=BATCH),
    )
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    settings = EngineConfig(train_iters=steps, valid_step=10 * steps, strategy="cpu")
    Engine(config=settings, problems=[upper, lower], dependencies=dependencies).run()
    return lower.module


def run(case: Case) -> dict[str, float]:
    train, guide, steps = (400, 100, 20) if case.quick else (8_000, 1_000, STEPS)
    data = noisy_clothes.load(case.data, case.seed, NOISE, train, guide, 1_000)
    case.note(steps=steps, train=train, guide=guide, noise=NOISE, rate=RATE, rates=RATES)
    makers = {"Betty": lambda rate: by_betty(data, case.seed, steps, rate)}
    for name, response in RESPONSES.items():
        makers[name] = lambda rate, response=response: by_nestor(data, case.seed, steps, rate, response)
    for name, make in makers.items():

        def trained(rate: float, make=make) -> Trained:
            network = make(rate)
            return Trained(float(accuracy(network, data.validation)), float(accuracy(network, data.test)))

        tuned(case, name, RATES, trained)
    return {name: method.metrics["accuracy"] for name, method in case.methods.items()}


def draw(figure: Figure, values: dict[str, float]) -> None:
    axes = figure.subplots()
    axes.barh(list(values), [100 * value for value in values.values()], color="#1b6ca8")
    axes.set(xlabel="test accuracy (%)", xlim=(min(values.values()) * 100 - 3, max(values.values()) * 100 + 1))


EXPERIMENT = Experiment(
    title="Meta-Weight-Net, by nestor and by Betty",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="nestor, T1T2",
    baselines=("Betty",),
)

if __name__ == "__main__":
    main(EXPERIMENT)
