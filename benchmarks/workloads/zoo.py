"""W2 on a zoo of models: Meta-Weight-Net on small images, for every kind of network at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.workloads.reweighting import Batch, Reweighting, WeightNet

SIDE, CLASSES = 14, 10


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(SIDE * SIDE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)),
    )


def cnn(width: int, *, norm: bool = False) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        middle: list[nn.Module] = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *middle, nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(1, width), *block(width, 2 * width), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2 * width * 9, 64), nn.ReLU(), nn.Linear(64, CLASSES))


class Recurrent(nn.Module):
    """A GRU or an LSTM over the rows of an image."""

    def __init__(self, kind: Callable[..., nn.Module], width: int) -> None:
        super().__init__()
        self.layer, self.head = kind(SIDE, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.squeeze(1))[0][:, -1])


class Transformer(nn.Module):
    """Two encoder layers over the rows of an image, without dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(SIDE, width), nn.Parameter(0.02 * torch.randn(SIDE, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.squeeze(1)) + self.positions).mean(1))


class Residual(nn.Module):
    """A convolution and a block of a ResNet, with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, width, 3, padding=1, bias=False) for i in (1, width, width))
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3)), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.convolutions[0](x)))
        y = F.relu(self.norms[1](self.convolutions[1](x)))
        x = F.relu(x + self.norms[2](self.convolutions[2](y)))
        return self.head(x.mean((2, 3)))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "MLP, small": partial(mlp, 64),
    "MLP, large": partial(mlp, 512),
    "CNN, small": partial(cnn, 8),
    "CNN, large": partial(cnn, 32),
    "CNN with BatchNorm, small": partial(cnn, 8, norm=True),
    "CNN with BatchNorm, large": partial(cnn, 32, norm=True),
    "GRU, small": partial(Recurrent, nn.GRU, 32),
    "GRU, large": partial(Recurrent, nn.GRU, 128),
    "LSTM, small": partial(Recurrent, nn.LSTM, 32),
    "LSTM, large": partial(Recurrent, nn.LSTM, 128),
    "transformer, small": partial(Transformer, 32),
    "transformer, large": partial(Transformer, 128),
    "ResNet block, small": partial(Residual, 8),
    "ResNet block, large": partial(Residual, 32),
}


def zoo(model: str, batch: int = 64, batches: int = 8) -> Reweighting:
    """One of ``MODELS``, trained by SGD with momentum."""
    torch.manual_seed(0)

    def data() -> list[Batch]:
        return [(torch.randn(batch, 1, SIDE, SIDE), torch.randint(0, CLASSES, (batch,))) for _ in range(batches)]

    net = MODELS[model]()
    return Reweighting(net, WeightNet(), data(), data(), lambda module: SGD(module.parameters(), lr=0.01, momentum=0.9))
