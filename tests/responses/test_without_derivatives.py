"""Evolution strategies and the score function: unbiased, by statistics with a seeded bound."""

from typing import Any

import pytest
import torch
from torch import Tensor

import nestor

MATRIX = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.2, -1.0]], dtype=torch.float64)


def within(samples: Tensor, expected: Tensor, errors: float = 4.0) -> None:
    """The mean of independent estimates lies within some standard errors of the truth, and says something."""
    mean, spread = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    assert ((mean - expected).abs() <= errors * spread + 1e-12).all()
    assert (spread <= 0.2 * expected.norm()).all()


def inner(theta: Any, weight: Any) -> Tensor:
    """The absolute value has no second derivative that would tell anything."""
    return (theta - MATRIX @ weight).abs().sum() + 0.5 * (theta - MATRIX @ weight).square().sum()


def test_evolution_strategies_are_unbiased() -> None:
    """The response of gradient descent is linear here, so smoothing does not change it."""
    weight = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    start = torch.full((3,), 5.0, dtype=torch.float64)  # far off: the sign of the residual is constant
    optimizer = torch.optim.SGD([start], lr=0.1)
    cotangent = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.manual_seed(0)
    results = []
    for _ in range(300):
        torch.rand(1)
        response = nestor.EvolutionStrategies(samples=4, sigma=0.1)
        theta = nestor.best_response(inner, start, weight, response, optimizer=optimizer)
        results.append(torch.autograd.grad(theta, weight, cotangent)[0])
    # theta_1 = start - 0.1 (sign + start - M w): d theta / d w = 0.1 M
    within(torch.stack(results), 0.1 * MATRIX.T @ cotangent)


@pytest.mark.parametrize("steps", [1, 6])
def test_evolution_strategies_in_an_engine(steps: int) -> None:
    """The mean over seeds tends to the derivative of the steps that were taken."""

    def run(response: nestor.Response, seed: int) -> Tensor:
        theta = nestor.Variable(torch.full((3,), 2.0, dtype=torch.float64))
        weight = nestor.Variable(torch.tensor([0.3, -0.8], dtype=torch.float64))

        def lower(batch: Tensor, theta: Any, weight: Any) -> Tensor:
            return (batch * (theta() - MATRIX @ weight()) ** 2).sum()

        program = nestor.Program(
            theta=nestor.Problem(
                theta,
                lower,
                data=[torch.rand(3, generator=torch.Generator().manual_seed(k)).double() for k in range(6)],
                optimizer=torch.optim.SGD(theta.parameters(), lr=0.1, momentum=0.5),
                unroll_steps=steps,
                response=response,
            ),
            weight=nestor.Problem(
                weight, lambda theta: (theta() ** 2).sum(), optimizer=torch.optim.SGD(weight.parameters(), lr=1.0)
            ),
        )
        before = weight.value.detach().clone()
        nestor.Engine(program, seed=seed).run(steps)
        return before - weight.value.detach()

    exact = run(nestor.Unrolled(), 0)
    estimates = torch.stack([run(nestor.EvolutionStrategies(samples=4, sigma=0.05), seed) for seed in range(60)])
    within(estimates, exact)


def test_evolution_strategies_leave_no_trace() -> None:
    """The generator goes on as if nothing had been drawn; the same state gives the same estimate."""
    weight = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    start = torch.zeros(3, dtype=torch.float64)
    optimizer = torch.optim.SGD([start], lr=0.1)
    before = torch.get_rng_state()
    results = []
    for _ in range(2):
        theta = nestor.best_response(inner, start, weight, nestor.EvolutionStrategies(), optimizer=optimizer)
        results.append(torch.autograd.grad(theta.sum(), weight)[0])
    assert torch.equal(*results)
    assert torch.equal(before, torch.get_rng_state())


def test_smoothed_is_unbiased_for_a_step_function() -> None:
    """d/dx E[sign(x + s e)] = sqrt(2/pi)/s exp(-x^2/2s^2), though sign has no slope anywhere."""
    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    results = []
    for _ in range(400):
        torch.rand(1)
        value = nestor.smoothed(lambda t: t.sign().sum(), x, samples=8, sigma=0.5)
        assert value.item() == 0.0
        results.append(torch.autograd.grad(value, x)[0])
    expected = (2 / torch.pi) ** 0.5 / 0.5 * torch.exp(-(x.detach() ** 2) / (2 * 0.25))
    within(torch.stack(results), expected)


def test_smoothed_inside_a_program() -> None:
    """An upper loss without a derivative learns: the accuracy of a threshold."""
    theta, weight = nestor.Variable(torch.tensor(0.0).double()), nestor.Variable(torch.tensor(-1.0).double())
    points = torch.linspace(-2, 2, 81, dtype=torch.float64)

    def errors(theta: Any) -> Tensor:
        def wrong(level: Tensor) -> Tensor:
            return ((points > level) != (points > 0.5)).double().mean()

        return nestor.smoothed(wrong, theta(), samples=8, sigma=0.2)

    program = nestor.Program(
        theta=nestor.Problem(
            theta,
            lambda theta, weight: (theta() - weight()) ** 2,
            optimizer=torch.optim.SGD(theta.parameters(), lr=0.5),
            response=nestor.Implicit(),
        ),
        weight=nestor.Problem(weight, errors, optimizer=torch.optim.Adam(weight.parameters(), lr=0.1)),
    )
    nestor.Engine(program, seed=0).run(60)
    assert abs(theta.value.item() - 0.5) < 0.2


@pytest.mark.parametrize("baseline", [True, False])
def test_score_function_is_unbiased(baseline: bool) -> None:
    """A Bernoulli choice: the expectation has a closed form, first and second derivative."""
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    first, second = [], []
    for _ in range(400):
        distribution = torch.distributions.Bernoulli(logits=logit)
        actions = distribution.sample((64,))
        costs = torch.where(actions == 1, 3.0, 1.0).double()
        value = nestor.ScoreFunction(baseline=baseline)(costs, distribution.log_prob(actions))
        torch.testing.assert_close(value.detach(), costs.mean())
        (slope,) = torch.autograd.grad(value, logit, create_graph=True)
        first.append(slope.detach())
        second.append(torch.autograd.grad(slope, logit)[0])
    p = torch.sigmoid(logit.detach())
    within(torch.stack(first)[:, None], (2 * p * (1 - p))[None])
    mean, spread = torch.stack(second).mean(), torch.stack(second).std() / 20
    assert abs(mean - 2 * p * (1 - p) * (1 - 2 * p)) <= 4 * spread


def test_baseline_lowers_the_variance() -> None:
    """Costs with a large common part."""
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    spread = {}
    for baseline in (True, False):
        torch.manual_seed(3)
        slopes = []
        for _ in range(100):
            distribution = torch.distributions.Bernoulli(logits=logit)
            actions = distribution.sample((16,))
            value = nestor.ScoreFunction(baseline=baseline)(100 + actions, distribution.log_prob(actions))
            slopes.append(torch.autograd.grad(value, logit)[0])
        spread[baseline] = torch.stack(slopes).std()
    assert spread[True] < 0.1 * spread[False]


def test_bad_arguments() -> None:
    """With the remedy."""
    logp = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="Sum the log-probabilities"):
        nestor.ScoreFunction()(torch.ones(3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="baseline=False"):
        nestor.ScoreFunction()(torch.ones(1), logp[:1])
    with pytest.raises(ValueError, match="no graph"):
        nestor.ScoreFunction()(torch.ones(3), logp.detach())
    with pytest.raises(ValueError, match="samples=0"):
        nestor.EvolutionStrategies(samples=0)
    with pytest.raises(ValueError, match=r"sigma=0\.0"):
        nestor.smoothed(torch.sum, logp, sigma=0.0)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(nestor.NestorError, match="optimizer="):
        nestor.best_response(inner, torch.zeros(3).double(), weight, nestor.EvolutionStrategies())
