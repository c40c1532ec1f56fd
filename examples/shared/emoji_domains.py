"""Two domains of emoji: drawn by Google, with wrong categories, as the source; drawn by Twitter as the target."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.batches import Batches
from shared.data.emoji import Emoji, emoji
from shared.digit_domains import Domains

SIZE, CLASSES = 28, 9


@lru_cache(maxsize=1)
def drawings(folder: Path) -> Emoji:
    """Return the emoji of both vendors."""
    return emoji(folder, SIZE)


def distinct(data: Emoji) -> Tensor:
    """Return the indices of the emoji whose drawing is not that of an earlier one, in either style."""
    kept, seen = [], set()
    for index in range(len(data.labels)):
        found = {("google", data.google[index].numpy().tobytes()), ("twitter", data.twitter[index].numpy().tobytes())}
        if not found & seen:
            kept.append(index)
        seen |= found
    return torch.tensor(kept)


def split(kept: Tensor, seed: int, source: int, target: int, validation: int) -> tuple[Tensor, ...]:
    """Return the emoji of source, target, validation and test as indices: each emoji is in one part, in one style."""
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    return order.split([source, target, validation, len(kept) - source - target - validation])


def domains(folder: Path, seed: int, source: int, target: int, validation: int, noise: float) -> Domains:
    """Draw the emoji of both domains, and the share ``noise`` of the categories of the source that are wrong."""
    data = drawings(folder)
    first, few, others, test = split(distinct(data), seed, source, target, validation)
    wrong = torch.rand(source, generator=torch.Generator().manual_seed(seed + 1_000)) < noise
    labels = (data.labels[first] + wrong) % CLASSES  # a wrong category is the next one

    def part(index: Tensor) -> Batches:
        return Batches(data.twitter[index], data.labels[index], size=100)

    return Domains(
        Batches(data.google[first], labels, torch.arange(source), size=100),
        part(few),
        part(others),
        part(torch.cat([few, others])),
        (data.twitter[test], data.labels[test]),
        wrong,
    )


def network() -> nn.Module:
    """Return a small convolutional network for drawings with three channels."""
    layers = (nn.Conv2d(3, 16, 7, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, CLASSES))
