"""What the architecture searches share: small images of clothes, training a chosen architecture anew, the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.batches import Batches
from shared.cells import EDGES, OPERATIONS, CellNetwork
from shared.data.images import fashion_mnist
from shared.experiment import Case

NODES = {0: (0.0, 0.5), 1: (1.0, 1.0), 2: (2.0, 0.5)}


@dataclass
class Clothes:
    """Fashion-MNIST at 14 x 14, N x 1 x 14 x 14 each, and labels.

    Attributes:
        train: For the weights of the networks.
        validation: For the architecture.
        test: For the final networks only.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def clothes(case: Case, train: int, validation: int) -> Clothes:
    """Draw images for training and validation from the training part, by the seed of the case."""
    data = fashion_mnist(case.data)
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(case.seed))
    parts = order[: train + validation].split([train, validation])
    small = [(F.avg_pool2d(data.train[part], 2), data.train_labels[part]) for part in parts]
    return Clothes(*small, (F.avg_pool2d(data.test, 2), data.test_labels))


def class_loss(batch: tuple[Tensor, Tensor], network: CellNetwork) -> Tensor:
    """Cross-entropy of a network that reads no logits."""
    images, labels = batch
    return F.cross_entropy(network(images), labels)


def optimizer(network: CellNetwork, rate: float = 0.1) -> SGD:
    """Return the optimizer of all networks, in the searches and after them."""
    return SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=3e-4)


def cosine(network: CellNetwork, steps: int, rate: float = 0.1) -> dict[str, Any]:
    """Return the optimizer and its schedule as options of a level."""
    steps_of = optimizer(network, rate)
    return {"optimizer": steps_of, "scheduler": CosineAnnealingLR(steps_of, steps)}


def retrained(case: Case, name: str, choice: Sequence[str] | None, data: Clothes, steps: int) -> CellNetwork:
    """Train a network with the chosen operations (all, equally weighted, if None) on training and validation images."""
    torch.manual_seed(case.seed)
    network = CellNetwork(choice=choice)
    images, labels = (torch.cat(parts) for parts in zip(data.train, data.validation, strict=True))
    level = nestor.Problem(network, class_loss, data=Batches(images, labels, size=64), **cosine(network, steps))
    case.train(name, nestor.Program(network=level), steps)
    return network.eval()


@torch.no_grad()
def accuracy(network: CellNetwork, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images whose class is right."""
    images, labels = data
    right = [
        (network(part).argmax(1) == truth) for part, truth in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(torch.cat(right).float().mean())


def draw_cells(axes: Axes, choice: Sequence[str]) -> None:
    """Draw the chosen operations of both cells as graphs, one below the other."""
    colors = dict(zip(OPERATIONS, [f"C{i}" for i in range(len(OPERATIONS))], strict=True))
    for cell, height in enumerate((1.0, -0.4)):
        for (source, target), name in zip(EDGES, choice[cell * len(EDGES) :], strict=False):
            (x0, y0), (x1, y1) = NODES[source], NODES[target]
            start, end = (x0, y0 + height), (x1, y1 + height)
            style = {"arrowstyle": "-|>", "mutation_scale": 15, "lw": 2.5, "shrinkA": 10, "shrinkB": 10}
            axes.add_patch(FancyArrowPatch(start, end, color=colors[name], **style))
            axes.text((x0 + x1) / 2, (y0 + y1) / 2 + height, name, ha="center", va="center", color=colors[name],
                      bbox={"fc": "white", "ec": "none", "pad": 1.0})  # fmt: skip
        for node, (x, y) in NODES.items():
            axes.text(x, y + height, "in" if node == 0 else str(node), ha="center", va="center",
                      bbox={"boxstyle": "circle", "fc": "lightgray", "ec": "none"})  # fmt: skip
        axes.text(0.1, 1.15 + height, ("first", "second")[cell] + " cell", fontweight="bold")
    axes.set(xlim=(-0.3, 2.3), ylim=(-0.2, 2.4), xticks=[], yticks=[])
    axes.set_frame_on(False)


def draw_weights(axes: Axes, history: Sequence[Tensor], steps: Sequence[int], row: int) -> None:
    """Draw the softmax weights of the operations of one edge along a search."""
    weights = torch.stack([torch.softmax(logits, 1)[row] for logits in history])
    for column, name in enumerate(OPERATIONS):
        axes.plot(steps, weights[:, column], color=f"C{column}", label=name)
    source, target = EDGES[row % len(EDGES)]
    cell = "first" if row < len(EDGES) else "second"
    axes.set_title(f"{cell} cell, {'in' if source == 0 else source} to {target}", fontsize=9)
