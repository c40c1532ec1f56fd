"""Sets of a few training images: networks trained on them, their accuracy, and simple ways to choose them."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

RATES, LENGTHS = (0.05, 0.1, 0.2), (20, 100, 300)
"""Learning rates and numbers of steps that ``search`` tries."""
Set = tuple[Tensor, Tensor]


def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (network(inputs).argmax(1) == labels).float().mean().item()


def new_network() -> nn.Module:
    first = (nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU())
    second = (nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(1568, 10))


def initialise(network: nn.Module) -> None:
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()


def steps_of(inputs: Tensor, targets: Tensor, rate: float, steps: int) -> Iterator[nn.Module]:
    """Train a new network on all images at once; yield it after every step."""
    network = new_network()
    optimizer = SGD(network.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
        yield network


def train(inputs: Tensor, targets: Tensor, rate: float, steps: int) -> nn.Module:
    """Return a new network after steps on the images."""
    *_, network = steps_of(inputs, targets, rate, steps)
    return network


def search(inputs: Tensor, held: Set, lengths: Sequence[int] = LENGTHS) -> tuple[float, int]:
    """Return the learning rate and the number of steps that are best on held-out images."""
    found = []
    for rate in RATES:
        for step, network in enumerate(steps_of(inputs, torch.arange(len(inputs)), rate, max(lengths)), start=1):
            if step in lengths:
                found.append((accuracy(network, *held), rate, step))
    return max(found)[1:]


def random_images(digits: Sequence[Tensor], held: Set) -> Tensor:
    """Return a random image of each class."""
    return torch.stack([each[torch.randint(len(each), ())] for each in digits])


def best_random_images(digits: Sequence[Tensor], held: Set) -> Tensor:
    """Return the set of random images whose network is best on held-out images, after 20 steps of rate 0.1."""
    sets = [random_images(digits, held) for _ in range(20)]
    return max(sets, key=lambda images: accuracy(train(images, torch.arange(len(images)), 0.1, 20), *held))


def mean_images(digits: Sequence[Tensor], held: Set) -> Tensor:
    """Return the mean image of each class."""
    return torch.stack([each.mean(0) for each in digits])


def central_images(digits: Sequence[Tensor], held: Set) -> Tensor:
    """Return the image of each class that is nearest to the mean."""
    return torch.stack([each[(each - each.mean(0)).flatten(1).norm(dim=1).argmin()] for each in digits])


CHOICES = {
    "random images": random_images,
    "best of 20 random sets": best_random_images,
    "mean images": mean_images,
    "central images": central_images,
}
