"""The contract that every response keeps.

Subclass :class:`ResponseContract`, say how the response is made and what it is to equal, and the tests below run.
"""

from __future__ import annotations

import gc
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.optim import functional_step

Objective = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass
class Lower:
    """A lower problem: its objective, a point, inputs, and the rate of the optimizer that steps it."""

    objective: Objective
    theta: list[Tensor]
    inputs: list[Tensor]
    rate: float = 0.05

    def optimizer(self) -> torch.optim.Optimizer:
        """Gradient descent with momentum."""
        return torch.optim.SGD(self.theta, lr=self.rate, momentum=0.5)

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """The Hessian and the mixed derivative, dense: shapes (n, n) and (n, m)."""
        theta, inputs = ([t.detach().clone().requires_grad_() for t in group] for group in (self.theta, self.inputs))
        grads = torch.autograd.grad(self.objective(theta, inputs), theta, create_graph=True, materialize_grads=True)
        rows = []
        for entry in torch.cat([g.reshape(-1) for g in grads]):
            found = torch.autograd.grad(entry, [*theta, *inputs], retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([f.reshape(-1) for f in found]))
        dense = torch.stack(rows)
        size = sum(t.numel() for t in theta)
        return dense[:, :size], dense[:, size:]


def random(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Tensors in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def quadratic() -> Lower:
    """A matrix that couples two tensors and a scalar; two inputs, one a scalar."""
    (a,) = random((7, 7), seed=1)
    matrix = a @ a.T / 7 + torch.eye(7, dtype=torch.float64)

    def objective(theta: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([t.reshape(-1) for t in theta])
        return 0.5 * flat @ matrix @ flat + (inputs[0] * flat).sum() + inputs[1] * flat.square().sum()

    theta = random((2, 2), (2,), (), seed=2)
    return Lower(objective, theta, [*random((7,), seed=3), torch.tensor(0.2, dtype=torch.float64)])


def ridge() -> Lower:
    """A penalty for every feature."""
    a, b, point = random((9, 4), (9,), (4,), seed=4)
    return Lower(
        lambda theta, inputs: (a @ theta[0] - b).square().mean() + (inputs[0].exp() * theta[0] ** 2).sum(),
        [point],
        [torch.zeros(4, dtype=torch.float64)],
    )


def logistic() -> Lower:
    """A weight for every sample."""
    a, point, weights = random((10, 3), (3,), (10,), seed=5)
    labels = (random((10,), seed=6)[0] > 0).double()

    def objective(theta: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(a @ theta[0], labels, reduction="none")
        return (torch.sigmoid(inputs[0]) * losses).sum() + 0.2 * theta[0].square().sum()

    return Lower(objective, [point], [weights])


def perceptron() -> Lower:
    """Two layers; one input is not used, another has a frozen neighbour."""
    x, y, w1, b1, w2, scale, unused = random((6, 3), (6,), (4, 3), (4,), (4,), (3,), (2,), seed=7)

    def objective(theta: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        hidden = torch.tanh((x * inputs[0].exp()) @ theta[0].T + theta[1])
        squares = sum(t.square().sum() for t in theta)
        return (hidden @ theta[2] - y).square().mean() + 2.5 * squares

    return Lower(objective, [0.3 * w1, 0.3 * b1, 0.3 * w2], [0.3 * scale, unused])


LOWERS = {make.__name__: make for make in (quadratic, ridge, logistic, perceptron)}


class Noisy(nn.Module):
    """Dropout, BatchNorm, tied weights, a frozen, an unused and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Predict."""
        x = F.dropout(torch.tanh(self.norm(self.first(x))), 0.4, self.training)
        return self.scale * (self.second(x) * self.frozen).sum(1)


def noisy_program(response: nestor.Response) -> tuple[nestor.Program, dict[str, Any]]:
    """A chain of two upper levels above a noisy lower one."""
    net = Noisy()
    weights, shift = nestor.Variable(torch.zeros(8).double()), nestor.Variable(torch.tensor(0.1).double())
    x, y = random((8, 3), (8,), seed=8)

    def train(batch: Any, net: Any, weights: Any, shift: Any) -> Tensor:
        decay = sum(p.square().sum() for p in net.parameters())
        return (torch.sigmoid(weights()) * (net(x) - y - shift()) ** 2).mean() + 4 * decay

    def middle(batch: Any, net: Any, weights: Any) -> Tensor:
        return (net(x.flip(0)) - y).square().mean() + 0.5 * weights().square().sum()

    def top(batch: Any, net: Any, weights: Any) -> Tensor:
        return net(x).square().mean()

    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    program = nestor.Program(
        net=nestor.Problem(net, train, optimizer=optimizer, unroll_steps=2, response=response, data=[0]),
        weights=nestor.Problem(weights, middle, response=nestor.T1T2(), data=[0]),
        shift=nestor.Problem(shift, top, data=[0]),
        nesting="frozen",
    )
    return program, {"net": 0, "weights": 0, "shift": 0}


class ResponseContract(ABC):
    """The tests of a response.

    Attributes:
        tolerance: Largest relative error against ``expected``.
        twice: Whether a second derivative is promised.
        random: Whether the result is an estimate.
    """

    tolerance = 1e-8
    twice = True
    random = False

    @abstractmethod
    def make(self) -> nestor.Response:
        """Make the response."""

    @abstractmethod
    def expected(self, lower: Lower, cotangent: Tensor) -> Tensor:
        """Write what it is to equal, by another derivation: a flat cotangent on the inputs."""

    def pull_back(self, lower: Lower, cotangent: Tensor) -> Tensor:
        """Apply the response to a flat cotangent."""
        inputs = [i.detach().clone().requires_grad_() for i in lower.inputs]
        theta = nestor.best_response(lower.objective, lower.theta, inputs, self.make(), optimizer=lower.optimizer())
        pieces = torch.split(cotangent, [t.numel() for t in theta])
        grads = torch.autograd.grad(
            theta, inputs, [p.view_as(t) for p, t in zip(pieces, theta, strict=True)], materialize_grads=True
        )
        return torch.cat([g.reshape(-1) for g in grads])

    def cotangent(self, lower: Lower, seed: int = 11) -> Tensor:
        """A random one."""
        return random((sum(t.numel() for t in lower.theta),), seed=seed)[0]

    @pytest.mark.parametrize("name", LOWERS)
    def test_equals_its_formula(self, name: str) -> None:
        """On a quadratic, ridge and logistic regression and a small perceptron."""
        lower = LOWERS[name]()
        cotangent = self.cotangent(lower)
        got, expected = self.pull_back(lower, cotangent), self.expected(lower, cotangent)
        assert (got - expected).norm() <= self.tolerance * max(expected.norm().item(), 1e-3)

    @pytest.mark.parametrize("name", LOWERS)
    def test_linear_in_the_cotangent(self, name: str) -> None:
        """Additive and homogeneous."""
        lower = LOWERS[name]()
        one, two = self.cotangent(lower, 12), self.cotangent(lower, 13)
        together = self.pull_back(lower, 2 * one - 3 * two)
        apart = 2 * self.pull_back(lower, one) - 3 * self.pull_back(lower, two)
        assert (together - apart).norm() <= 10 * self.tolerance * max(apart.norm().item(), 1e-3)
        assert self.pull_back(lower, torch.zeros_like(one)).norm() == 0

    def test_deterministic(self) -> None:
        """The same generators, the same bits; with dropout too."""
        lower = perceptron()
        cotangent = self.cotangent(lower)
        assert torch.equal(self.pull_back(lower, cotangent), self.pull_back(lower, cotangent))
        program, batches = noisy_program(self.make())
        one, two = (program.hypergradient("shift", batches)["value"] for _ in range(2))
        assert torch.equal(one, two)
        assert torch.isfinite(one).all()

    def test_no_trace(self) -> None:
        """Parameters, buffers, gradients, generators and optimizer are as before."""
        program, batches = noisy_program(self.make())
        net = program.levels["net"].problem.module
        before = [t.detach().clone() for t in (*net.parameters(), *net.buffers())]
        generator = torch.get_rng_state()
        program.hypergradient("shift", batches)
        program.hypergradient("weights", batches)
        assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *net.buffers()), strict=True))
        assert torch.equal(generator, torch.get_rng_state())
        assert all(p.grad is None for p in net.parameters())
        optimizer = program.levels["net"].problem.optimizer
        assert optimizer is not None
        assert not optimizer.state

    def test_several_uppers_at_once(self) -> None:
        """Inputs of two levels get their cotangents together; those of one alone are the same."""
        lower = quadratic()
        cotangent = self.cotangent(lower)
        both = self.pull_back(lower, cotangent)
        first = Lower(lambda t, i: lower.objective(t, [i[0], lower.inputs[1]]), lower.theta, lower.inputs[:1])
        alone = self.pull_back(first, cotangent)
        if not self.random:
            assert (both[:7] - alone).norm() <= 10 * self.tolerance * max(alone.norm().item(), 1e-3)

    def test_second_derivative(self) -> None:
        """Differentiated once more, where that is promised: against a finite difference of the first derivative."""
        if not self.twice:
            pytest.skip("promises none")
        lower = quadratic()
        cotangent = self.cotangent(lower)
        inputs = [i.detach().clone().requires_grad_() for i in lower.inputs]

        def first(values: Sequence[Tensor]) -> Tensor:
            star = nestor.best_response(
                lower.objective, self.solved(lower, values), values, self.make(), optimizer=lower.optimizer()
            )
            flat = torch.cat([t.reshape(-1) for t in star])
            loss = (flat * cotangent).sum() + (flat**3).sum()
            return torch.autograd.grad(loss, values, create_graph=True)[1]

        (got,) = torch.autograd.grad(first(inputs), inputs[1])
        step = 1e-5
        ends = [first([inputs[0], (inputs[1] + s * step).detach().requires_grad_()]).item() for s in (1, -1)]
        assert abs(got.item() - (ends[0] - ends[1]) / (2 * step)) <= 1e-5 * abs(got.item()) + 1e-8

    def solved(self, lower: Lower, values: Sequence[Tensor]) -> list[Tensor]:
        """The point at which the response is taken: for implicit differentiation, the minimum."""
        moved = Lower(lower.objective, lower.theta, [v.detach() for v in values])
        hessian, _ = moved.derivatives()
        theta = [t.detach().clone().requires_grad_() for t in lower.theta]
        grads = torch.autograd.grad(lower.objective(theta, moved.inputs), theta)
        step = torch.linalg.solve(hessian, torch.cat([g.reshape(-1) for g in grads]))
        pieces = torch.split(step, [t.numel() for t in theta])
        return [(t - p.view_as(t)).detach() for t, p in zip(theta, pieces, strict=True)]

    def test_memory_is_released(self) -> None:
        """Nothing of an evaluation outlives it."""
        alive: list[weakref.ref[Tensor]] = []
        lower = quadratic()

        def objective(theta: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
            value = lower.objective(theta, inputs)
            alive.append(weakref.ref(value))
            return value

        self.pull_back(Lower(objective, lower.theta, lower.inputs), self.cotangent(lower))
        gc.collect()
        assert not any(ref() is not None for ref in alive)


def implicit(lower: Lower, cotangent: Tensor) -> Tensor:
    """-M^T H^-1 c, dense."""
    hessian, mixed = lower.derivatives()
    return -mixed.T @ torch.linalg.solve(hessian, cotangent)


def mixed_product(lower: Lower, cotangent: Tensor) -> Tensor:
    """-M^T c, dense."""
    return -lower.derivatives()[1].T @ cotangent


def unrolled(lower: Lower, cotangent: Tensor, steps: int) -> Tensor:
    """One graph through the steps."""
    inputs = [i.detach().clone().requires_grad_() for i in lower.inputs]
    params, state = [t.detach().clone().requires_grad_() for t in lower.theta], None
    for _ in range(steps):
        grads = torch.autograd.grad(lower.objective(params, inputs), params, create_graph=True)
        params, state = functional_step(lower.optimizer(), params, grads, state)
    flat = torch.cat([p.reshape(-1) for p in params])
    grads = torch.autograd.grad(flat @ cotangent, inputs, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])
