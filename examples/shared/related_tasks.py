"""Eight small classification tasks, five of which belong together."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data import images

NAMES = ("-20°", "-10°", "0°", "10°", "20°", "relabelled", "clothes", "clothes, 180°")
"""Digits turned by five angles; digits whose labels run backwards; clothes; clothes upside down."""

_ANGLES = (-20, -10, 0, 10, 20, 0, 0, 180)


def related_tasks(folder: Path, seed: int, count: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [8, count, 784] and labels of the tasks' training parts, and those of their test parts."""
    generator = torch.Generator().manual_seed(seed)
    digits, clothes = images.mnist(folder), images.fashion_mnist(folder)
    parts = []
    for task, angle in enumerate(_ANGLES):
        source = clothes if task >= 6 else digits
        chosen = torch.randperm(len(source.train), generator=generator)[:count]
        unseen = torch.randperm(len(source.test), generator=generator)[:test]
        labels = [source.train_labels[chosen], source.test_labels[unseen]]
        if task == 5:
            labels = [9 - each for each in labels]
        turned = [turn(source.train[chosen], angle).flatten(1), turn(source.test[unseen], angle).flatten(1)]
        parts.append((turned[0], labels[0], turned[1], labels[1]))
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def turn(pixels: Tensor, degrees: float) -> Tensor:
    """Rotate images about their centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(pixels), 2, 3)
    grid = F.affine_grid(rotation, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)
