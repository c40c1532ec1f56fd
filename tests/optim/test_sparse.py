"""Sparse gradients are made dense: the same hypergradients and steps as with ``sparse=False``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, SparseAdam

import nestor

IDS = torch.tensor([[0, 3, 3], [1, 0, 2]])


class Bag(nn.Module):
    """Sums of embeddings."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 2, mode="sum", sparse=sparse, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)[:, None]  # type: ignore[no-any-return]


class Single(nn.Module):
    """One embedding a word."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2, sparse=sparse, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)  # type: ignore[no-any-return]


RESPONSES: list[nestor.Response] = [
    nestor.T1T2(),
    nestor.FiniteDifference(),
    nestor.Implicit(solver=nestor.ConjugateGradient(), damping=1.0),
    nestor.SAMA(),
    nestor.Unrolled(),
]


def run(module: Any, sparse: bool, make: Any, response: nestor.Response) -> list[Tensor]:
    torch.manual_seed(0)
    net, w = module(sparse=sparse), nestor.Variable(torch.zeros(2, dtype=torch.float64))

    def loss(net: Any, w: Any) -> Tensor:
        return (torch.sigmoid(w()) * net(IDS).square().sum((1, 2))).mean() + net(IDS).sin().sum()

    program = nestor.Program(
        net=nestor.Problem(net, loss, optimizer=make(net.parameters()), unroll_steps=2, response=response),
        w=nestor.Problem(w, lambda net: net(IDS).pow(3).sum(), optimizer=SGD(w.parameters(), lr=0.01)),
    )
    nestor.Engine(program, seed=0).run(6)
    return [*net.parameters(), w.value]


# EmbeddingBag has no second derivative in torch.
CASES = [*((Single, response) for response in RESPONSES), (Bag, nestor.FiniteDifference()), (Bag, nestor.SAMA())]


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: Adagrad(p, lr=0.1), lambda p: Adam(p, lr=0.1)])
@pytest.mark.parametrize(("module", "response"), CASES)
def test_like_dense_gradients(module: Any, make: Any, response: nestor.Response) -> None:
    """Two runs from the same numbers."""
    for got, expected in zip(run(module, True, make, response), run(module, False, make, response), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_sparse_adam_is_refused() -> None:
    """Its step takes nothing else."""
    with pytest.raises(nestor.UnsupportedError, match=r"level 'net'.*SparseAdam takes sparse gradients only.*Adam"):
        run(Single, True, lambda p: SparseAdam(list(p), lr=0.1), nestor.T1T2())
