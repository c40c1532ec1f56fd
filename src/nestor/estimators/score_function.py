"""The score-function estimator, REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreFunction:
    r"""Write an expected cost over samples as a scalar whose derivatives, of any order, are unbiased estimates.

    .. math:: \nabla_\theta\, \mathbb{E}_{a \sim \pi_\theta}[f(a, \theta)] = \mathbb{E}\big[(f - b)\,
        \nabla_\theta \log\pi_\theta(a) + \nabla_\theta f\big]

    Call it inside a loss, ``ScoreFunction()(costs, log_probs)``: a lower or an upper level may then sample actions, and
    hypergradients run through it like through any loss. The value is the mean cost. The factor
    :math:`\exp(\log\pi - \text{detach}(\log\pi))` carries the derivative (Foerster et al., 2018).

    Args:
        baseline: Subtract from each cost the mean of the others, which lowers the variance and keeps the estimate
            unbiased. Needs two samples.

    References: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    Machine Learning 8, 1992. Foerster et al., DiCE: The infinitely differentiable Monte-Carlo estimator, ICML 2018.
    """

    baseline: bool = True

    def __call__(self, costs: Tensor, log_probs: Tensor) -> Tensor:
        """Average the costs of samples.

        Args:
            costs: Shape ``(n,)``, one cost a sample; may depend on parameters directly.
            log_probs: Shape ``(n,)``, the log-probability of each sample, with a graph to the parameters.

        Returns:
            A scalar, the mean cost.

        Raises:
            ValueError: If the shapes differ or are not one-dimensional, ``log_probs`` has no graph though gradients are
                enabled, or a baseline is wanted of one sample.
        """
        if costs.dim() != 1 or costs.shape != log_probs.shape:
            raise ValueError(
                f"ScoreFunction takes one cost and one log-probability a sample; the shapes are {tuple(costs.shape)} "
                f"and {tuple(log_probs.shape)}. Sum the log-probabilities of an episode first."
            )
        count = len(costs)
        if self.baseline and count < 2:
            raise ValueError(
                "The baseline is the mean of the other samples, and there is one: ScoreFunction(baseline=False)."
            )
        if torch.is_grad_enabled() and not log_probs.requires_grad:
            raise ValueError(
                "log_probs has no graph, so nothing can be learned from the samples: compute it from the parameters "
                "with distribution.log_prob(actions), actions detached."
            )
        weight = torch.exp(log_probs - log_probs.detach())
        value = costs * weight
        if self.baseline:
            others = (costs.detach().sum() - costs.detach()) / (count - 1)
            value = value + others * (1 - weight)
        return value.mean()
