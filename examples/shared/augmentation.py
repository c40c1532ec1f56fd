"""Random transformations of grey images, differentiable in the ranges that they are drawn from."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("rotation", "zoom", "shear", "shift x", "shift y", "contrast")
"""In radians; logarithm; tangent; halves of the width and of the height; logarithm."""
ZEROS = (0.0,) * len(KINDS)


class RandomTransformation(nn.Module):
    """Transforms each image by amounts ``centre + half_width * u`` with ``u`` uniform in [-1, 1], one for each kind.

    Args:
        centres: By kind; all 0 leaves the images in place.
        half_widths: By kind.
    """

    def __init__(self, centres: Sequence[float] = ZEROS, half_widths: Sequence[float] = ZEROS) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor(centres))
        self.half_widths = nn.Parameter(torch.tensor(half_widths))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        draws = 2 * torch.rand(len(images), len(KINDS), generator=generator) - 1
        return transformed(images, self.centres + self.half_widths * draws)

    def copy(self) -> "RandomTransformation":
        """Return the present ranges."""
        return RandomTransformation(self.centres.tolist(), self.half_widths.tolist())


def transformed(images: Tensor, amounts: Tensor) -> Tensor:
    """Return the images, each rotated, zoomed, sheared, shifted and dimmed by its row of amounts."""
    rotation, zoom, shear, right, down, contrast = amounts.T
    cosine, sine, scale = rotation.cos(), rotation.sin(), torch.exp(-zoom)
    # `affine_grid` maps places of the result to places of the image: the inverse transformation.
    rows = [
        cosine * scale,
        (sine - shear * cosine) * scale,
        -right,
        -sine * scale,
        (cosine + shear * sine) * scale,
        -down,
    ]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) * contrast.exp()[:, None, None, None]
