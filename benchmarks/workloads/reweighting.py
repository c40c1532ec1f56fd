"""W2 and W3: each sample's loss is weighted by a small network of that loss (Meta-Weight-Net)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

Batch = tuple[Tensor, Tensor]


class WeightNet(nn.Module):
    """Loss of a sample -> its weight in (0, 1)."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, losses: Tensor) -> Tensor:
        return torch.sigmoid(self.net(losses.unsqueeze(1))).squeeze(1)


class SmallCNN(nn.Module):
    """About 220,000 parameters, images 28 x 28."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.f1 = nn.Linear(2 * width * 7 * 7, 128)
        self.f2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(x.flatten(1))))


class Encoder(nn.Module):
    """A transformer of BERT-base's size (108 M parameters), without dropout."""

    def __init__(self, vocabulary: int = 30522, width: int = 768, layers: int = 12, heads: int = 12, length: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids) + self.positions)[:, 0])


@dataclass
class Reweighting:
    """Lower: the model, on weighted losses. Upper: the weighting network, on clean data, Adam."""

    model: nn.Module
    weighting: WeightNet
    train: list[Batch]
    validation: list[Batch]
    lower_optimizer: Callable[[nn.Module], Optimizer]
    upper_lr: float = 1e-3
    rel_step: float = 0.01

    def train_loss(self, model: nn.Module, weighting: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (weighting(losses.detach()) * losses).mean()

    def validation_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def quality(self) -> float:
        with torch.no_grad():
            return float(self.validation_loss(self.model, self.validation[0]))


def images(batch: int = 100, batches: int = 8, seed: int = 0) -> Reweighting:
    """W2: a small CNN, SGD with momentum."""
    torch.manual_seed(seed)

    def data() -> list[Batch]:
        return [(torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))) for _ in range(batches)]

    model = SmallCNN()
    return Reweighting(
        model, WeightNet(), data(), data(), lambda module: SGD(module.parameters(), lr=0.01, momentum=0.9)
    )


def text(
    optimizer: str = "sgd", batch: int = 4, length: int = 64, layers: int = 12, width: int = 768, words: int = 30522
) -> Reweighting:
    """W3: a transformer of BERT-base's size; SGD with momentum, or Adam."""
    torch.manual_seed(0)

    def data() -> list[Batch]:
        return [(torch.randint(0, words, (batch, length)), torch.randint(0, 2, (batch,))) for _ in range(4)]

    makers: dict[str, Callable[[nn.Module], Optimizer]] = {
        "sgd": lambda module: SGD(module.parameters(), lr=1e-3, momentum=0.9),
        "adam": lambda module: Adam(module.parameters(), lr=1e-5),
    }
    model = Encoder(words, width, layers, length=length)
    return Reweighting(model, WeightNet(), data(), data(), makers[optimizer])
