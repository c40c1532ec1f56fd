"""A perceptron whose weights are masked, and masks that keep the weights with the largest scores."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """784 pixels, 100 and 50 hidden units, 10 classes; every weight matrix has a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in ((784, 100), (100, 50), (50, 10)))

    def forward(self, pixels: Tensor, masks: Sequence[Tensor]) -> Tensor:
        for layer, mask in zip(self.layers, masks, strict=True):
            pixels = F.linear(torch.relu(pixels), mask * layer.weight, layer.bias)
        return pixels


def largest(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return masks of the given share of all scores."""
    flat = torch.cat([score.flatten() for score in scores])
    threshold = flat.kthvalue(max(round((1 - share) * len(flat)), 1)).values
    return [(score > threshold).float() for score in scores]


class Masks(nn.Module):
    """Scores of all weights; calling it returns the masks, whose gradient the scores receive unchanged."""

    def __init__(self, scores: Sequence[Tensor], share: float) -> None:
        super().__init__()
        self.scores, self.share = nn.ParameterList(score.clone() for score in scores), share

    def forward(self) -> list[Tensor]:
        hard = largest([score.detach() for score in self.scores], self.share)
        return [mask + score - score.detach() for mask, score in zip(hard, self.scores, strict=True)]


def magnitudes(network: Perceptron) -> list[Tensor]:
    return [layer.weight.detach().abs() for layer in network.layers]
