"""The response by solving the lower level again at random points."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestor.errors import NestorError
from nestor.estimators.smoothed import directions
from nestor.optim.recording import Recording
from nestor.responses.lower_level import LowerLevel
from nestor.responses.response import Response
from nestor.responses.unrolling.trajectory import Trajectory
from nestor.vectors import algebra
from nestor.vectors.algebra import Params


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies(Response):
    r"""Take the lower level's steps again with its inputs moved at random; nothing is differentiated twice.

    .. math:: \Big(\frac{d\theta_T}{d\lambda}\Big)^T c \approx \frac1n \sum_{i=1}^n
        \frac{\langle c, \theta_T(\lambda + \sigma\varepsilon_i) - \theta_T(\lambda - \sigma\varepsilon_i)\rangle}
        {2\sigma}\,\varepsilon_i

    Unbiased for the Gaussian average of the response; the variance grows with the number of upper variables, so it is a
    method for few of them, or for lower losses that have no second derivative. ``2 n`` re-solves of all steps since a
    level above last stepped (of ``unroll_steps`` steps ahead without an engine), on the batches and with the random
    numbers of the steps that were taken. An upper loss that has no derivative either goes through
    :func:`nestor.smoothed` or :class:`nestor.ScoreFunction`.

    Args:
        samples: ``n``, antithetic pairs.
        sigma: Standard deviation of the perturbations, in units of the upper variables.

    Raises:
        ValueError: If ``samples`` or ``sigma`` is not positive.

    References: Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning, 2017. Metz et
    al., Understanding and correcting pathologies in the training of learned optimizers, ICML 2019.
    """

    samples: int = 16
    sigma: float = 0.01

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"EvolutionStrategies(samples={self.samples}) must be at least 1.")
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"EvolutionStrategies(sigma={self.sigma}) must be positive and finite.")

    @property
    def recording(self) -> Recording:
        """The steps since a level above moved, and the first state."""
        return Recording()

    def reach(self, lower: LowerLevel, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Take the steps that lie ahead."""
        trajectory = _trajectory(lower)
        if not trajectory.ahead:
            return lower, theta
        return replace(lower, trajectory=replace(trajectory, ahead=False)), _end(trajectory, inputs)

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Re-solve at random points; see :class:`Response`. Linear in the cotangent, constant in the rest."""
        trajectory = _trajectory(lower)
        point = [i.detach() for i in trajectory.along(inputs)]
        total = [torch.zeros_like(i) for i in point]
        for direction in directions(point, self.samples):
            ends = [_end(trajectory, algebra.axpy(sign * self.sigma, direction, point)) for sign in (1.0, -1.0)]
            slope = lower.space.dot(cotangent, algebra.subtract(*ends)) / (2 * self.sigma * self.samples)
            total = algebra.axpy(slope, direction, total)
        return list(total)

    def describe(self) -> str:
        """Name the method and the number of pairs."""
        return f"EvolutionStrategies(samples={self.samples}, sigma={self.sigma:g})"


def _end(trajectory: Trajectory, given: Params) -> list[Tensor]:
    with torch.no_grad():
        state = trajectory.first(given)
        for step in trajectory.steps:
            state = step.advance(state, given)
    return list(state.params)


def _trajectory(lower: LowerLevel) -> Trajectory:
    if lower.trajectory is None:
        raise NestorError(
            "EvolutionStrategies() takes the level's optimizer steps again, and none are known. In a program, give the "
            "level an optimizer; with best_response, pass optimizer=torch.optim.SGD([theta], lr=...).",
            level=lower.name,
        )
    return lower.trajectory
