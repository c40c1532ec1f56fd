"""The gradient of a level, and whether its numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.errors import NonFiniteError
from nestor.levels.level import Level
from nestor.vectors.space import VectorSpace


class Gradient(NamedTuple):
    """The (hyper)gradient of one level and what was seen on the way.

    Attributes:
        loss: The objective's value, detached; for a level with tasks their mean.
        metrics: What the loss returned beside it, of the last batch.
        values: One gradient a variable; None for a variable that the objective does not depend on.
        norm: Euclidean norm of the values.
        inputs: The gradient in the variables of levels above, by level name, if it was asked for.
        cotangents: What the loss sends into the response of each lower level; None stands for zero.
    """

    loss: Tensor
    metrics: Mapping[str, Any]
    values: list[Tensor | None]
    norm: Tensor
    cotangents: Mapping[str, Sequence[Tensor | None]]
    inputs: Mapping[str, list[Tensor | None]] = MappingProxyType({})

    def scalars(self, space: VectorSpace) -> Gradient:
        """Keep only what tells where a number that is not finite came from: no vector, norms for the cotangents."""
        norms = {name: [space.norm(found)] for name, c in self.cotangents.items() if (found := present(c))}
        return Gradient(self.loss, {}, [], self.norm, norms)


def present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Leave out what is None."""
    return [v for v in values if v is not None]


def is_finite(gradient: Gradient) -> Tensor:
    """Whether the loss and every gradient are finite; a boolean tensor, so nothing waits for the device."""
    return torch.isfinite(gradient.loss + gradient.norm)


def reads_finite(gradient: Gradient) -> bool:
    """Whether the loss and every gradient are finite; waits for the device."""
    return math.isfinite(gradient.loss) and math.isfinite(gradient.norm)


def diagnose(level: Level, gradient: Gradient) -> NonFiniteError:
    """Say where the first number that is not finite came from."""
    space = level.space
    gradient = gradient.scalars(space)
    if not bool(torch.isfinite(gradient.loss)):
        cause = (
            f"The loss is {gradient.loss.item()}. Look for a logarithm or a division by zero, an overflow, too large a "
            "learning rate, or a bad batch."
        )
    elif broken := [n for n, c in gradient.cotangents.items() if not bool(torch.isfinite(space.norm(present(c))))]:
        cause = (
            f"The cotangent that the loss sends into the best response of {broken[0]!r} is not finite, though the loss "
            f"is {gradient.loss.item():.3g}: a derivative is infinite (sqrt or log at zero?)."
        )
    elif gradient.cotangents:
        cause = (
            f"The hypergradient is not finite, though the loss and its cotangents are: the response of "
            f"{', '.join(map(repr, gradient.cotangents))} overflowed. Its lower loss may have an infinite second "
            "derivative, or the solve diverged: add damping, or try T1T2()."
        )
    else:
        cause = f"The gradient is not finite, though the loss is {gradient.loss.item():.3g} (sqrt or log at zero?)."
    return NonFiniteError(f"{cause} Parameters are as before the step.", level=level.name, where=level.where)
