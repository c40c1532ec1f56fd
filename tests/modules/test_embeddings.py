"""Embeddings: padding, tied weights and sparse gradients, in levels of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.responses.implicit.cross.cheapest import FORWARD_MODE_FROM

IDS = torch.randint(0, 50, (6, 4), generator=torch.Generator().manual_seed(2))
IDS[:, 2:] = 0
# Below and above the border from which the default response uses forward mode.
SIZES = [50, FORWARD_MODE_FROM // 4 + 50]
CG = nestor.ConjugateGradient(max_steps=20, rtol=1e-12)
RESPONSES: dict[str, nestor.Response] = {
    "t1t2": nestor.T1T2(),
    "forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "cg": nestor.Implicit(solver=CG, damping=50.0),
    "neumann": nestor.Implicit(solver=nestor.Neumann(step_size=0.1)),
    "sama": nestor.SAMA(),
    "differences": nestor.FiniteDifference(),
    "unrolled": nestor.Unrolled(),
    "unrolled-none": nestor.Unrolled(checkpoint="none"),
    "forward-unrolled": nestor.ForwardUnrolled(),
}


def program(net: nn.Module, response: nestor.Response) -> nestor.Program:
    weights = nestor.Variable(torch.linspace(-1, 1, 6, dtype=torch.float64))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    return nestor.Program(
        net=nestor.Problem(net, words, optimizer=sgd, response=response, unroll_steps=3),
        weights=nestor.Problem(weights, other_words, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1)),
    )


def value_of(net: nn.Module, response: nestor.Response) -> Tensor:
    return program(net, response).hypergradient("weights")["value"]


class Tied(nn.Module):
    """An embedding whose first words are its decoder, as in BERT."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(size, 4, **options).double()
        with torch.no_grad():
            self.embedding.weight[:50] = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.embedding(ids)).mean(1) @ self.embedding.weight[:50].T


class Cut(Tied):
    """The same without ``padding_idx``: the padding row is detached where it is looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embedding(ids)
        rows = torch.where((ids == 0)[..., None], rows.detach(), rows)
        return torch.tanh(rows).mean(1) @ self.embedding.weight[:50].T


def words(net: Tied, weights: nestor.Variable) -> Tensor:
    return (weights().sigmoid() * F.cross_entropy(net(IDS), torch.arange(6), reduction="none")).mean()


def other_words(net: Tied) -> Tensor:
    return F.cross_entropy(net(IDS), torch.arange(6) + 1)


@pytest.mark.filterwarnings("ignore:.*looks up row 0 of an embedding")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cross", [None, nestor.ForwardMode(), nestor.ReverseMode()])
def test_a_tied_embedding_with_padding(size: int, cross: nestor.CrossDerivative | None) -> None:
    """The value does not depend on the size of the level: a lookup of the padding row is a constant."""
    wanted = value_of(Cut(SIZES[0]), nestor.T1T2(cross=nestor.ReverseMode()))
    got = value_of(Tied(size, padding_idx=0), nestor.T1T2(cross=cross))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*looks up row 0 of an embedding")
@pytest.mark.parametrize("response", [nestor.Unrolled(), nestor.ForwardUnrolled()])
def test_unrolled_steps_of_a_tied_embedding_with_padding(response: nestor.Response) -> None:
    """Forward and reverse mode through the steps agree too."""
    wanted = value_of(Cut(50), nestor.Unrolled())
    got = value_of(Tied(50, padding_idx=0), response)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RESPONSES)
def test_sparse_gradients(name: str, size: int) -> None:
    """The steps and responses are those of dense gradients."""
    nets, found = [Tied(size), Tied(size, sparse=True)], []
    for net in nets:
        tried = program(net, RESPONSES[name])
        found.append(tried.hypergradient("weights")["value"])
        nestor.Engine(tried, seed=0).run(4)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(nets[1].embedding.weight, nets[0].embedding.weight, rtol=1e-9, atol=1e-13)


def test_sparse_adam_is_refused() -> None:
    """It cannot take the dense gradients of a level."""
    net, weights = Tied(50, sparse=True), nestor.Variable(torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"level 'net', loss words .*SparseAdam.*Adam"):
        nestor.Program(
            net=nestor.Problem(net, words, optimizer=torch.optim.SparseAdam(net.parameters())),
            weights=nestor.Problem(weights, other_words),
        )
