"""Networks that judge a weak label: how much it counts, and what it should be."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights(nn.Module):
    """How much a document counts, from its loss and its weak label."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.layers = nn.Sequential(nn.Linear(1 + groups, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, losses: Tensor, weak: Tensor) -> Tensor:
        inputs = torch.cat([losses[:, None], F.one_hot(weak, self.groups)], 1)
        return torch.sigmoid(self.layers(inputs)).squeeze(1)


class Correction(nn.Module):
    """The label of a document as a distribution, from its features and its weak label, which it trusts at first."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.confusion = nn.Parameter(3.0 * torch.eye(groups))
        self.layers = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, groups))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, features: Tensor, weak: Tensor) -> Tensor:
        return torch.softmax(self.confusion[weak] + self.layers(features), 1)
