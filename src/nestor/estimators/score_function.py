"""The score-function estimator (REINFORCE)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors.options import check_options


@dataclass(frozen=True, kw_only=True)
class ScoreFunction:
    r"""Write an expected cost over samples as a scalar whose derivatives, of any order, are unbiased estimates.

    .. math:: \nabla_\theta\, \mathbb{E}_{a \sim \pi_\theta}[f(a, \theta)] = \mathbb{E}\big[(f - b)\,
        \nabla_\theta \log\pi_\theta(a) + \nabla_\theta f\big]

    A loss calls ``ScoreFunction()(costs, log_probs)``. A lower or an upper level may then sample actions, and
    hypergradients are computed as for any loss. The value is the mean cost. Each cost is multiplied by
    :math:`\exp(\log\pi - \text{detach}(\log\pi))`, which is 1 and has the derivative of :math:`\log\pi` (Foerster et
    al., 2018).

    Args:
        baseline: Subtract from each cost the mean of the other costs. This lowers the variance and keeps the estimate
            unbiased. Needs at least two samples.

    References: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    Machine Learning 8, 1992. Foerster et al., DiCE: The infinitely differentiable Monte-Carlo estimator, ICML 2018.

    Example:
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> coin = torch.distributions.Bernoulli(logits=logit)
        >>> heads = coin.sample((10_000,))
        >>> (slope,) = torch.autograd.grad(nestor.ScoreFunction()(3 * heads, coin.log_prob(heads)), logit)
        >>> bool((slope - 0.75).abs() < 0.1)  # the derivative of 3 sigmoid(logit)
        True
    """

    baseline: bool = True

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, costs: Tensor, log_probs: Tensor) -> Tensor:
        """Return the mean cost of the samples.

        Args:
            costs: Shape ``(n,)``, one cost for each sample; may depend on the parameters directly.
            log_probs: Shape ``(n,)``, the log-probability of each sample, with a graph to the parameters.

        Returns:
            A scalar, the mean cost.

        Raises:
            ValueError: If the shapes differ or are not one-dimensional, if ``log_probs`` has no graph though gradients
                are enabled, or if ``baseline`` is True for one sample.
        """
        if costs.dim() != 1 or costs.shape != log_probs.shape:
            raise ValueError(
                "ScoreFunction takes one cost and one log-probability for each sample; the shapes are "
                f"{tuple(costs.shape)} and {tuple(log_probs.shape)}. Sum the log-probabilities of an episode first."
            )
        count = len(costs)
        if self.baseline and count < 2:
            raise ValueError(
                "The baseline is the mean cost of the other samples, but there is only one sample: "
                "ScoreFunction(baseline=False)."
            )
        if torch.is_grad_enabled() and not log_probs.requires_grad:
            raise ValueError(
                "log_probs has no graph, so the estimate would be zero: compute log_probs from the parameters, with "
                "distribution.log_prob(actions) at detached actions."
            )
        weight = torch.exp(log_probs - log_probs.detach())
        value = costs * weight
        if self.baseline:
            others = (costs.detach().sum() - costs.detach()) / (count - 1)
            value = value + others * (1 - weight)
        return value.mean()
