"""Small networks that weigh a training image by what a classifier makes of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from shared.noisy_clothes import outputs


class WeightFunction(nn.Module):
    """The weight of an image from its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        return self.layers(losses[:, None]).squeeze(1)


class Importance(nn.Module):
    """The importance of an image from its loss and its uncertainty."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1), nn.Sigmoid())

    def forward(self, losses: Tensor, uncertainty: Tensor) -> Tensor:
        return self.layers(torch.stack([losses, uncertainty], 1)).squeeze(1)


def uncertainty_of(logits: Tensor, averaged: Tensor) -> Tensor:
    """Return how far the probabilities of a classifier are from those of its average."""
    return (logits.softmax(1) - averaged.softmax(1)).abs().sum(1)


class Watch(nestor.callbacks.Callback):
    """Updates the teacher, and adds up the importance of all images in the last quarter."""

    def __init__(self, *modules: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.modules, self.images, self.labels, self.seen = modules, images, labels, []

    def on_step(self, engine) -> None:
        """Update the teacher; look at all images now and then."""
        classifier, teacher, importance = self.modules
        teacher.update_parameters(classifier)
        every = max(engine.last_step // 20, 1)
        if engine.step > engine.last_step * 3 // 4 and engine.step % every == 0:
            logits = outputs(classifier, self.images)
            losses = F.cross_entropy(logits, self.labels, reduction="none")
            uncertainty = uncertainty_of(logits, outputs(teacher, self.images))
            with torch.no_grad():
                self.seen.append(torch.stack([losses, uncertainty, importance(losses, uncertainty)]))
