"""Evolution strategies: the response by replaying the lower level's steps at random points."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.errors import NestorError
from nestor.errors.options import check_options
from nestor.estimators.smoothed import directions
from nestor.responses.response import Response
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies(Response):
    r"""Replay the lower level's steps with randomly perturbed inputs; nothing is differentiated twice.

    .. math:: \Big(\frac{d\theta_T}{d\lambda}\Big)^T c \approx \frac1n \sum_{i=1}^n
        \frac{\langle c, \theta_T(\lambda + \sigma\varepsilon_i) - \theta_T(\lambda - \sigma\varepsilon_i)\rangle}
        {2\sigma}\,\varepsilon_i

    The estimate is unbiased for the Gaussian average of the response. Its variance grows with the number of upper
    variables: use it for few of them, or for lower losses without a second derivative. All steps since a level above
    last stepped (without an engine, ``unroll_steps`` planned steps) are replayed ``2 n`` times, on their batches and
    with their random numbers. For an upper loss without a derivative, use :func:`nestor.smoothed` or
    :class:`nestor.ScoreFunction`.

    Args:
        samples: ``n``, antithetic pairs.
        sigma: Standard deviation of the perturbations, in units of the upper variables.

    Raises:
        ValueError: If ``samples`` or ``sigma`` is not positive.

    References: Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning, 2017. Metz et
    al., Understanding and correcting pathologies in the training of learned optimizers, ICML 2019.

    Example:
        >>> theta, weight = torch.nn.Parameter(torch.tensor([0.0])), torch.tensor([2.0], requires_grad=True)
        >>> sgd, response = torch.optim.SGD([theta], lr=0.5), nestor.EvolutionStrategies(samples=500, sigma=0.1)
        >>> last = nestor.best_response(lambda t, w: ((t - w) ** 2).sum(), theta, weight, response, optimizer=sgd)
        >>> (slope,) = torch.autograd.grad(last.sum(), weight)
        >>> bool((slope - 1).abs() < 0.3)  # the derivative of the step is 1
        True
    """

    replays_steps: ClassVar[bool] = True
    works_on_shards: ClassVar[bool] = False
    differentiates_steps: ClassVar[bool] = False
    is_random: ClassVar[bool] = True
    samples: int = 16
    sigma: float = 0.01

    def __post_init__(self) -> None:
        check_options(self, counts=["samples"], positive=["sigma"])

    @property
    def differentiates_twice(self) -> bool:
        """False: the steps are taken at other inputs."""
        return False

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Replay the steps at random points; see :class:`Response`. The result is linear in the cotangent."""
        trajectory = lower.needed_trajectory(self.describe())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *cotangent)):
            raise NestorError(
                "The estimate of EvolutionStrategies has no derivative, which a level in the middle needs under exact "
                'nesting. Write Program(nesting="frozen", ...), or another response for this level.',
                level=lower.objective.name,
            )
        point = [i.detach() for i in trajectory.inputs_then(inputs)]
        total = [torch.zeros_like(i) for i in point]
        for direction in directions(point, self.samples):
            ends = [trajectory.end(algebra.axpy(sign * self.sigma, direction, point)) for sign in (1.0, -1.0)]
            slope = lower.space.dot(cotangent, algebra.subtract(*ends)) / (2 * self.sigma * self.samples)
            total = algebra.axpy(slope, direction, total)
        return list(total)

    def describe(self) -> str:
        return f"EvolutionStrategies(samples={self.samples}, sigma={self.sigma:g})"
