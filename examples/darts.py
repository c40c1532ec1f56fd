"""Differentiable architecture search (DARTS): the operations of two convolutional cells are learned.

Every edge of a cell is a mixture of seven operations, weighted by a softmax. The lower level trains the weights of the
network on training images, and the upper level learns the logits of the mixtures on validation images:

    min_a  L_validation(theta*(a), a)   with   theta*(a) = argmin_theta  L_train(theta, a)

In the first half of the search only the weights are trained: without this, operations that have no weights win in the
second cell. After the search every edge keeps its strongest operation (other than `none`). The network is then trained
from new weights on the training and the validation images together, and only that network sees the test images. The
response is T1T2 at the point before the lower step, with the lower learning rate as its scale: the gradient through one
lower step, as in the paper, with exact second derivatives in place of finite differences.

Compared with architectures drawn uniformly from the same operations (the mean of three), with first-order DARTS (the
response is zero), and with the whole mixture with equal weights, which has six operations on every edge. All networks
have the same optimizer and the same steps of training. The warm-up, and the logit rate from 0.03 and 0.1, were chosen
with seed 0 on 3,000 further images of the training part of the data. The final trainings are short (300 steps): the
accuracy of a chosen network depends on the seed by about as much as on the operations.

Data: Fashion-MNIST at 14 x 14, 2,000 images for training and 2,000 for validation from its training part, 10,000 for
test.

Liu, Simonyan and Yang, DARTS: differentiable architecture search, ICLR 2019, sections 2.2 and 2.3.
"""

import random
from dataclasses import dataclass, field
from statistics import fmean

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.optim import Adam

import nestor
from shared.architecture_search import Clothes, accuracy, clothes, cosine, draw_cells, draw_weights, retrained
from shared.batches import Batches
from shared.cells import EDGES, OPERATIONS, CellNetwork, strongest
from shared.experiment import Case, Experiment, main

SEARCH, RETRAIN, RANDOM, PARTS, BATCH = 240, 300, 3, 2_000, 64
WARMUP, RATE, LOGIT_RATE = 0.5, 0.1, 0.03


def train_loss(batch, network, logits):  # lower level: the logits constrain it
    images, labels = batch
    return F.cross_entropy(network(images, logits()), labels)


def validation_loss(batch, logits, network):  # upper level: reads the best response of the network
    images, labels = batch
    return F.cross_entropy(network(images, logits()), labels)


class History(nestor.callbacks.Callback):
    """The logits along a search."""

    def __init__(self, logits: nestor.Variable) -> None:
        self.logits, self.steps, self.values = logits, [], []

    def on_step(self, engine) -> None:
        if engine.step % 4 == 0:
            self.steps.append(engine.step)
            self.values.append(self.logits().detach().clone())


def search(case: Case, name: str, response: nestor.Response, data: Clothes, steps: int) -> History:
    network, logits = CellNetwork(), nestor.Variable(torch.zeros(2 * len(EDGES), len(OPERATIONS)))
    program = nestor.Program(
        network=nestor.Problem(
            network, train_loss, data=Batches(*data.train, size=BATCH), response=response, unroll_steps=2,
            warmup_steps=round(WARMUP * steps), **cosine(network, steps, RATE),
        ),
        logits=nestor.Problem(
            logits, validation_loss, data=Batches(*data.validation, size=BATCH),
            optimizer=Adam(logits.parameters(), lr=LOGIT_RATE, betas=(0.5, 0.999)),
        ),
    )  # fmt: skip
    history = History(logits)
    case.train(f"search, {name}", program, steps, callbacks=[history])
    return history


@dataclass
class Picture:
    history: History
    accuracies: dict[str, list[float]] = field(default_factory=dict)
    choice: list[str] = field(default_factory=list)


def run(case: Case) -> Picture:
    searching, training, part = (4, 4, 128) if case.quick else (SEARCH, RETRAIN, PARTS)
    data = clothes(case, part, part)
    case.note(
        search_steps=searching, training_steps=training, rate=RATE, logit_rate=LOGIT_RATE, warmup=WARMUP, batch=BATCH
    )

    def judge(name: str, choice: list[str]) -> float:
        return accuracy(retrained(case, name, choice, data, training), data.test)

    picture = None
    for name, response in {"DARTS": nestor.T1T2(scale=RATE, reuse=True), "first order": nestor.FirstOrder()}.items():
        with case.method(name) as method:
            history = search(case, name, response, data, searching)
            choice = strongest(history.values[-1])
            method.report(accuracy=judge(f"{name}, chosen", choice))
            method.report(convolutions=sum("conv" in operation for operation in choice))
        picture = picture or Picture(history, choice=choice)
        picture.accuracies[name] = [method.metrics["accuracy"]]
    with case.method("random architecture") as method:
        draw_of = random.Random(case.seed)
        choices = [draw_of.choices(OPERATIONS[1:], k=2 * len(EDGES)) for _ in range(1 if case.quick else RANDOM)]
        picture.accuracies["random"] = [judge(f"random {i}", choice) for i, choice in enumerate(choices)]
        method.report(accuracy=fmean(picture.accuracies["random"]))
    with case.method("uniform mixture") as method:
        method.report(accuracy=accuracy(retrained(case, "uniform mixture", None, data, training), data.test))
    picture.accuracies["uniform\nmixture"] = [method.metrics["accuracy"]]
    return picture


def draw(figure: Figure, picture: Picture) -> None:
    grid = figure.subplot_mosaic("ADEFB;AGHIB", width_ratios=(1.9, 1, 1, 1, 0.8))
    draw_cells(grid["A"], picture.choice)
    grid["A"].set_title("found by DARTS")
    for row, place in enumerate("DEFGHI"):
        draw_weights(grid[place], picture.history.values, picture.history.steps, row)
    figure.legend(*grid["D"].get_legend_handles_labels(), loc="outside lower center", ncols=len(OPERATIONS))
    for place, values in enumerate(picture.accuracies.values()):
        grid["B"].plot([place] * len(values), [100 * value for value in values], "o", color=f"C{place}")
    grid["B"].set_xticks(range(len(picture.accuracies)), picture.accuracies, rotation=60, fontsize=9)
    grid["B"].set(title="test accuracy (%)", xlim=(-0.5, len(picture.accuracies) - 0.5))


EXPERIMENT = Experiment(
    title="DARTS: differentiable architecture search",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="DARTS",
    baselines=("random architecture", "first order", "uniform mixture"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
