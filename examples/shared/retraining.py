"""Small models of digits, trained in float64 by a fixed order of batches, and trained anew without some images."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.optim import SGD

import nestor
from shared.data.images import small_digits

RATE, DECAY, MOMENTUM = 0.03, 1e-3, 0.9


class Patches(nn.Module):
    """A convolution of 3 x 3 with stride 2, as a linear map of patches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9, channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.unfold(images, 3, padding=1, stride=2).transpose(-1, -2)).flatten(-2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
    "convolutional": lambda: nn.Sequential(Patches(8), nn.GELU(), nn.Linear(128, 10)),
}


def optimizer(net: nn.Module) -> SGD:
    """Return the optimizer of all trainings."""
    return SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)


def weighted_loss(batch, net) -> Tensor:
    """Mean loss of the images, each times its weight, with a weight decay."""
    images, labels, weights = batch
    logits = nestor.outputs(net(images))  # a Gauss-Newton matrix linearises them
    penalty = DECAY / 2 * sum(p.square().sum() for p in net.parameters())
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean() + penalty


def margin(batch, net) -> Tensor:
    """Logit of the label of one query, above the log-sum-exp of the others."""
    image, label = batch
    logits = net(image[None])[0]
    return logits[label] - torch.logsumexp(torch.where(torch.arange(10) == label, -torch.inf, logits), 0)


@dataclass(frozen=True)
class Setting:
    """A model before training, the training images, the batch of each step as indices, and the queries."""

    net: nn.Module
    images: Tensor
    labels: Tensor
    order: list[Tensor]
    queries: tuple[Tensor, Tensor]

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return images, labels, indices and numbers of copies, the same images for the copy of each query."""
        count = len(self.queries[1])
        parts = (self.images[index], self.labels[index], index)
        return *(part.expand(count, *part.shape) for part in parts), torch.arange(count)

    def checkpoints(self, count: int) -> list[nn.Module]:
        """Train once with weights of 1; return the models along the run, the trained one last."""
        net, found = deepcopy(self.net), []
        data = [(self.images[i], self.labels[i], torch.ones(len(i)).double()) for i in self.order]
        program = nestor.Program(net=nestor.Problem(net, weighted_loss, data=data, optimizer=optimizer(net)))
        engine = nestor.Engine(program, seed=0)
        for _ in range(count):
            engine.run(len(data) // count)
            found.append(deepcopy(net))
        return found

    def retrained(self, kept: Tensor) -> Tensor:
        """Return the margins of models trained on the images that are kept: one copy for each row of ``kept``."""
        net, copies = deepcopy(self.net), len(kept)
        data = [
            (self.images[i].expand(copies, -1, -1, -1, -1), self.labels[i].expand(copies, -1), kept[:, i])
            for i in self.order
        ]
        program = nestor.Program(
            net=nestor.Problem(net, weighted_loss, data=data, tasks=copies, optimizer=optimizer(net))
        )
        nestor.Engine(program, seed=0).run(len(data))
        queries = list(zip(*self.queries, strict=True))
        with torch.no_grad():
            return torch.stack([torch.stack([margin(q, net) for q in queries]) for net in program.copies("net")])

    def draw_extremes(self, axes: Sequence[Axes], query: int, tau: Tensor) -> None:
        """Draw a query, then the training images with the largest and with the smallest attribution to it."""
        count, order = (len(axes) - 1) // 2, tau.argsort(descending=True)
        panels = [(self.queries[0][query], f"a {self.queries[1][query]}", "black")]
        for i in (*order[:count], *order.flip(0)[:count]):
            color = "tab:green" if tau[i] > 0 else "tab:red"
            panels.append((self.images[i], f"{self.labels[i]}: {tau[i]:+.2f}", color))
        for axis, (image, title, color) in zip(axes, panels, strict=True):
            axis.imshow(image[0], cmap="gray_r")
            axis.set_title(title, fontsize=8, color=color, pad=2)
            axis.set_axis_off()


def settings(seed: int, train: int, queries: int, steps: int, batch: int = 100) -> dict[str, Setting]:
    """Draw images and initial models; return a setting for each model."""
    digits, generator = small_digits(), torch.Generator().manual_seed(seed)
    index = torch.randperm(len(digits.labels), generator=generator)[: train + queries]
    images, labels = digits.images[index].double(), digits.labels[index]
    epochs = [torch.randperm(train, generator=generator).split(batch) for _ in range(steps)]
    order = [index for epoch in epochs for index in epoch][:steps]
    torch.manual_seed(seed)
    return {
        name: Setting(make().double(), images[:train], labels[:train], order, (images[train:], labels[train:]))
        for name, make in MODELS.items()
    }


def datamodeling_scores(tau: Tensor, kept: Tensor, actual: Tensor) -> Tensor:
    """Return, for each query, the rank correlation of predicted and actual margins (LDS)."""
    predicted = (kept - 1) @ tau.T
    return torch.tensor([spearmanr(predicted[:, q], actual[:, q]).statistic for q in range(len(tau))])


def lower_bound(scores: Tensor, draws: int = 10_000) -> float:
    """Return the lower end of the 95 % confidence interval of a mean, from means of draws with replacement."""
    index = torch.randint(len(scores), (draws, len(scores)), generator=torch.Generator().manual_seed(0))
    return float(scores[index].mean(1).quantile(0.025))
