"""Small convolutional networks made of cells: with mixed operations for an architecture search, or with chosen ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EDGES = ((0, 1), (0, 2), (1, 2))
"""Edges of a cell: node 0 is its input, its output is the concatenation of nodes 1 and 2."""
OPERATIONS = ("none", "skip", "max pool", "avg pool", "conv 3", "conv 5", "dw conv 3")


def operation(name: str, channels: int) -> nn.Module:
    """Return an operation that keeps the size and the number of channels."""

    def convolution(size: int, groups: int = 1) -> nn.Conv2d:
        return nn.Conv2d(channels, channels, size, padding=size // 2, groups=groups, bias=False)

    norm = nn.BatchNorm2d(channels, affine=False)
    layers: dict[str, tuple[nn.Module, ...]] = {
        "skip": (),
        "max pool": (nn.MaxPool2d(3, 1, 1), norm),
        "avg pool": (nn.AvgPool2d(3, 1, 1), norm),
        "conv 3": (nn.ReLU(), convolution(3), norm),
        "conv 5": (nn.ReLU(), convolution(5), norm),
        "dw conv 3": (nn.ReLU(), convolution(3, channels), convolution(1), norm),
    }
    return nn.Sequential(*layers[name])


class MixedEdge(nn.Module):
    """The weighted sum of all operations; ``none`` adds zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.operations = nn.ModuleList(operation(name, channels) for name in OPERATIONS[1:])

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the operations with the weights of one edge."""
        results = [weight * apply(features) for weight, apply in zip(weights[1:], self.operations, strict=True)]
        return torch.stack(results).sum(0)


class Cell(nn.Module):
    """A graph of nodes; each is the sum of its edges, and the output concatenates all but the input."""

    def __init__(self, inputs: int, channels: int, choice: Sequence[str] | None) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.ReLU(), nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.edges = nn.ModuleList(
            MixedEdge(channels) if choice is None else operation(choice[i], channels) for i in range(len(EDGES))
        )

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the nodes' features; ``weights`` has a row for each mixed edge."""
        nodes = [self.entry(features)]
        for node in (1, 2):
            arriving = [
                edge(nodes[source]) if weights is None else edge(nodes[source], weights[row])
                for row, (edge, (source, target)) in enumerate(zip(self.edges, EDGES, strict=True))
                if target == node
            ]
            nodes.append(torch.stack(arriving).sum(0))
        return torch.cat(nodes[1:], 1)


class CellNetwork(nn.Module):
    """A convolution, two cells with pooling between them, and a linear classifier of the mean features.

    Args:
        channels: Channels of a node.
        choice: The operation of every edge of both cells; without it, all edges are mixed.
    """

    def __init__(self, channels: int = 8, choice: Sequence[str] | None = None) -> None:
        super().__init__()
        self.mixed = choice is None
        first, second = (None, None) if choice is None else (choice[: len(EDGES)], choice[len(EDGES) :])
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels))
        self.first, self.second = Cell(channels, channels, first), Cell(2 * channels, channels, second)
        self.pool, self.classify = nn.AvgPool2d(2), nn.Linear(2 * channels, 10)

    def forward(self, images: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return class scores; ``logits`` has a row for each edge of both cells and a column for each operation.

        Mixed edges without logits weight all operations equally.
        """
        if logits is None and self.mixed:
            logits = torch.zeros(2 * len(EDGES), len(OPERATIONS))
        weights = (None, None) if logits is None else torch.softmax(logits, 1).chunk(2)
        features = self.pool(self.first(self.stem(images), weights[0]))
        return self.classify(self.second(features, weights[1]).mean((2, 3)))


def strongest(logits: Tensor) -> list[str]:
    """Return the operation with the largest weight on every edge, other than ``none``."""
    return [OPERATIONS[1 + int(row[1:].argmax())] for row in logits]
