"""Saliency-aware architecture search: the architecture is judged by a network that is taught what matters in an image.

Four stages. A first network is trained. The perturbation of an image that raises the loss of this network most, within
a ball, says which pixels matter: its absolute value is a saliency map. A second network of the same architecture is
trained on the images times their saliency maps. The architecture minimises the validation losses of both:

    min_a  L_validation(second*(a), a) + L_validation(first*(a), a)
    first*(a)  = argmin_u  L_train(u, a; images)
    second*(a) = argmin_v  L_train(v, a; images * saliency(first*(a), a))
    saliency(u, a) = |d| / mean |d|   with   d = argmax_|d| <= radius  L_train(u, a; images + d)

The third stage is a few steps of projected gradient ascent inside the loss of the second level, with graphs, so that
three levels are left. The gradient of the architecture passes the second network, the saliency maps and the first
network. (The paper's ascent follows signs; this one follows normalised gradients, which can be differentiated.)

Compared with DARTS and with random architectures (the mean of three). DARTS has as many lower steps as both networks of
the other search together, and one step of the architecture for as many lower steps. The chosen operations are trained
from new weights on the plain training and validation images. Rates and the warm-up (the architecture waits for half of
the steps) are those of `darts.py`; nothing was tuned for one of the two searches.

Data: Fashion-MNIST at 14 x 14, 2,000 images for training and 2,000 for validation from its training part, 10,000 for
test.

Hosseini and Xie, Saliency-aware neural architecture search, NeurIPS 2022, section 3.
"""

import random
from dataclasses import dataclass, field
from statistics import fmean

import torch
import torch.nn.functional as F
from saliency_nas_report import draw
from torch import Tensor
from torch.optim import Adam

import nestor
from shared.architecture_search import Clothes, accuracy, clothes, cosine, retrained
from shared.batches import Batches
from shared.cells import EDGES, OPERATIONS, CellNetwork, strongest
from shared.experiment import Case, Experiment, main

ROUNDS, UNROLL, RETRAIN, RANDOM, PARTS, BATCH = 120, 2, 300, 3, 2_000, 48
RATE, LOGIT_RATE, RADIUS, ASCENT = 0.1, 0.03, 1.0, 2


def first_loss(batch, first, logits):  # lowest level: the logits constrain it
    images, labels = batch
    return F.cross_entropy(first(images, logits()), labels)


def saliency(images: Tensor, labels: Tensor, first: CellNetwork, logits: Tensor) -> Tensor:
    """The size of the perturbation that raises the loss most, pixel by pixel, with mean 1; differentiable."""
    perturbation = torch.zeros_like(images, requires_grad=True)
    with torch.enable_grad():
        for _ in range(ASCENT):
            loss = F.cross_entropy(first(images + perturbation, logits), labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, perturbation, create_graph=True)
            perturbation = perturbation + RADIUS / ASCENT * F.normalize(slope, dim=(1, 2, 3))
    size = perturbation.abs()
    return size / size.mean((1, 2, 3), keepdim=True)


def second_loss(batch, second, first, logits):  # middle level: reads the best response of the first network
    images, labels = batch
    return F.cross_entropy(second(images * saliency(images, labels, first, logits()), logits()), labels)


def architecture_loss(batch, logits, first, second):  # upper level
    return first_loss(batch, first, logits) + first_loss(batch, second, logits)


def network_level(loss, data: Clothes, steps: int, **schedule: int) -> nestor.Problem:
    network, batches = CellNetwork(), Batches(*data.train, size=BATCH)
    options = {**schedule, **cosine(network, steps, RATE)}
    return nestor.Problem(network, loss, data=batches, response=nestor.T1T2(scale=RATE, reuse=True), **options)


def logits_level(loss, data: Clothes) -> nestor.Problem:
    logits = nestor.Variable(torch.zeros(2 * len(EDGES), len(OPERATIONS)))
    optimizer = Adam(logits.parameters(), lr=LOGIT_RATE, betas=(0.5, 0.999))
    return nestor.Problem(logits, loss, data=Batches(*data.validation, size=BATCH), optimizer=optimizer)


def saliency_aware(data: Clothes, rounds: int) -> nestor.Program:
    return nestor.Program(
        first=network_level(first_loss, data, rounds),
        second=network_level(second_loss, data, rounds, unroll_steps=UNROLL, warmup_steps=rounds // 2),
        logits=logits_level(architecture_loss, data),
    )


def darts(data: Clothes, steps: int) -> nestor.Program:
    return nestor.Program(
        first=network_level(first_loss, data, steps, unroll_steps=2 * UNROLL, warmup_steps=steps // 2),
        logits=logits_level(lambda batch, logits, first: first_loss(batch, first, logits), data),
    )


@dataclass
class Picture:
    images: Tensor
    maps: Tensor
    choices: dict[str, list[str]] = field(default_factory=dict)
    accuracies: dict[str, list[float]] = field(default_factory=dict)


def run(case: Case) -> Picture:
    rounds, training, part = (4, 4, 128) if case.quick else (ROUNDS, RETRAIN, PARTS)
    data = clothes(case, part, part)
    case.note(rounds=rounds, training_steps=training, rate=RATE, logit_rate=LOGIT_RATE, batch=BATCH, unroll=UNROLL)
    case.note(radius=RADIUS, ascent_steps=ASCENT)
    choices: dict[str, list[str]] = {}
    found: dict[str, list[float]] = {}

    def judge(name: str, choice: list[str]) -> float:
        return accuracy(retrained(case, name, choice, data, training), data.test)

    for name, make, steps in (("saliency-aware", saliency_aware, rounds), ("DARTS", darts, 2 * rounds)):
        with case.method(name) as method:
            program = make(data, steps)
            case.train(f"search, {name}", program, steps)
            modules = {level: program.levels[level].problem.module for level in program.levels}
            choices[name] = strongest(modules["logits"]().detach())
            found[name] = [judge(f"{name}, chosen", choices[name])]
            method.report(accuracy=found[name][0], convolutions=sum("conv" in each for each in choices[name]))
        if name == "saliency-aware":
            images, labels = (tensor[:8] for tensor in data.validation)
            maps = saliency(images, labels, modules["first"], modules["logits"]()).detach()
    with case.method("random architecture") as method:
        generator = random.Random(case.seed)
        drawn = [generator.choices(OPERATIONS[1:], k=2 * len(EDGES)) for _ in range(1 if case.quick else RANDOM)]
        found["random"] = [judge(f"random {i}", choice) for i, choice in enumerate(drawn)]
        method.report(accuracy=fmean(found["random"]))
    return Picture(images, maps, choices, found)


EXPERIMENT = Experiment(
    title="Saliency-aware architecture search",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="saliency-aware",
    baselines=("DARTS", "random architecture"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
