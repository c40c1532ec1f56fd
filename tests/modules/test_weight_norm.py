"""Weight normalization: torch's own operation has a wrong second derivative, and every response needs one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import nestor

STEPS = 3
X, Y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).double() for shape in ((8, 4), (8, 1)))


class Elementary(nn.Module):
    """The same by elementary operations."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / v.square().sum(1, keepdim=True).sqrt())

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.square().sum(1, keepdim=True).sqrt(), weight


def parametrized(layer: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(layer)


def hooked(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many models
        return nn.utils.weight_norm(layer)


def elementary(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Elementary())
    return layer


Normalize = Callable[[nn.Linear], nn.Module]


def model(normalize: Normalize) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    normalize(net[0])
    return net


def train_loss(net: nn.Module, w: nn.Module) -> Tensor:
    return (torch.sigmoid(w()) * (net(X) - Y).square().squeeze(1)).mean()


def clean_loss(net: nn.Module) -> Tensor:
    return (net(X.flip(0)) - Y).square().mean()


def hypergradient(normalize: Normalize, response: nestor.Response) -> Tensor:
    net, w = model(normalize), nestor.Variable(torch.linspace(-1, 1, 8).double())
    program = nestor.Program(
        net=nestor.Problem(
            net, train_loss, optimizer=torch.optim.SGD(net.parameters(), 0.2), response=response, unroll_steps=STEPS
        ),
        w=nestor.Problem(w, clean_loss),
    )
    return program.hypergradient("w")["value"]


RESPONSES: dict[str, nestor.Response] = {
    "reverse": nestor.T1T2(cross=nestor.ReverseMode()),
    "forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "CG": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=300, rtol=1e-13), damping=3.0),
    "Unrolled": nestor.Unrolled(),
    "ForwardUnrolled": nestor.ForwardUnrolled(),
}


@pytest.mark.parametrize("normalize", [parametrized, hooked])
@pytest.mark.parametrize("response", RESPONSES)
def test_it_equals_elementary_operations(response: str, normalize: Any) -> None:
    found, expected = (hypergradient(each, RESPONSES[response]) for each in (normalize, elementary))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [parametrized, hooked])
def test_it_is_the_derivative_of_training(normalize: Any) -> None:
    """Central differences of steps by torch alone."""
    start, found = model(normalize).state_dict(), hypergradient(normalize, nestor.Unrolled())

    def trained(values: Tensor) -> float:
        net, w = model(normalize), nestor.Variable(values)
        net.load_state_dict(copy.deepcopy(start))
        optimizer = torch.optim.SGD(net.parameters(), 0.2)
        for _ in range(STEPS):
            optimizer.zero_grad()
            train_loss(net, w).backward()
            optimizer.step()
        return float(clean_loss(net).detach())

    point, eps = torch.linspace(-1, 1, 8).double(), 1e-5
    sides = [(trained(point + eps * e), trained(point - eps * e)) for e in torch.eye(8).double()]
    expected = torch.tensor([(a - b) / (2 * eps) for a, b in sides]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
