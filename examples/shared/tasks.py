"""Few-shot tasks drawn from a set of classes, and a MAML loop written by hand to compare with."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Four convolutions and a linear head; normalized by group, so that images do not depend on their batch."""

    def __init__(self, classes: int = 5, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (1, channels, channels, channels):
            convolution = nn.Conv2d(before, channels, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(8, channels), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def nearest(self, support: Batch) -> Callable[[Tensor], Tensor]:
        """Return a classifier of images by the cosine of their features to those of one image of each class."""
        images, _ = support
        with torch.no_grad():
            centres = F.normalize(self.body(images), dim=1)
        return lambda queries: F.normalize(self.body(queries), dim=1) @ centres.T


class Letters:
    """Endless batches of images with the class of each, as for an ordinary classifier."""

    def __init__(self, classes: Tensor, size: int) -> None:
        self.classes, self.size = classes, size

    def __iter__(self) -> Iterator[Batch]:
        count, drawings = self.classes.shape[:2]
        while True:
            labels = torch.randint(count, (self.size,))
            yield self.classes[labels, torch.randint(drawings, (self.size,))][:, None].float() / 255, labels


class Tasks:
    """Endless batches of tasks as pairs ``(support, query)`` of images and labels, tasks along the first dimension.

    A task is ``ways`` classes; each has ``shots`` images in the support and ``queries`` others in the query. The same
    seed gives the same tasks, so that methods see the same ones.

    Args:
        classes: Grey images, uint8, classes x drawings x height x width.
        tasks: Tasks of a batch.
    """

    def __init__(self, classes: Tensor, tasks: int, *, ways: int = 5, shots: int = 1, queries: int = 5, seed: int = 0):
        self.classes, self.tasks, self.ways, self.shots, self.queries = classes, tasks, ways, shots, queries
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield self.draw(generator)

    def draw(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        count, drawings = self.classes.shape[:2]
        chosen = torch.rand(self.tasks, count, generator=generator).topk(self.ways).indices[..., None]
        order = torch.rand(self.tasks, self.ways, drawings, generator=generator).argsort(-1)
        images = self.classes[chosen, order[..., : self.shots + self.queries]].float() / 255
        support, query = images.split([self.shots, self.queries], dim=2)
        return self._batch(support), self._batch(query)

    def _batch(self, images: Tensor) -> Batch:
        labels = torch.arange(self.ways).repeat_interleave(images.shape[2]).expand(self.tasks, -1)
        return images.flatten(1, 2)[:, :, None], labels


def accuracy(classes: Tensor, tasks: int, learn: Callable[[Batch], Callable[[Tensor], Tensor]]) -> float:
    """Return the share of right queries; ``learn(support)`` returns what classifies the queries of a task."""
    right = 0.0
    for (support, query), _ in zip(Tasks(classes, 1, seed=1_000_000), range(tasks), strict=False):
        classify = learn((support[0][0], support[1][0]))
        with torch.no_grad():
            right += (classify(query[0][0]).argmax(1) == query[1][0]).float().mean().item()
    return right / tasks


def maml_by_hand(network: nn.Module, tasks: Tasks, updates: int, steps: int, rate: float, meta_rate: float) -> None:
    """Meta-train the parameters of a network in place by MAML, with nothing but torch."""
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=meta_rate)

    def loss(values: dict[str, Tensor], batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(functional_call(network, values, (images,)), labels)

    def query_loss(values: dict[str, Tensor], support: Batch, query: Batch) -> Tensor:
        for _ in range(steps):
            slopes = grad(loss)(values, support)
            values = {name: value - rate * slopes[name] for name, value in values.items()}
        return loss(values, query)

    for _, (support, query) in zip(range(updates), tasks, strict=False):
        optimizer.zero_grad()
        vmap(query_loss, in_dims=(None, 0, 0))(parameters, support, query).mean().backward()
        optimizer.step()
