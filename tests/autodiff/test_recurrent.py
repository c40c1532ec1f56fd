"""LSTM and GRU on dual numbers equal their derivatives by reverse mode."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

import nestor
from nestor.autodiff.forward_mode import dual, load_rules
from nestor.autodiff.recurrent import CELLS
from nestor.autodiff.slope import SlopeMode


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("count", "bidirectional"), [(1, False), (2, False), (1, True), (3, True)])
def test_layers(kind: Any, count: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    load_rules()
    for batch_first, bias, moves, starts in product([True, False], repeat=4):
        net = kind(3, 5, count, bidirectional=bidirectional, batch_first=batch_first, bias=bias).double()
        first = torch.randn(count * (1 + bidirectional), 4 if batch_first else 6, 5, dtype=torch.float64)
        start = () if not starts else ((first, first.cos()),) if kind is nn.LSTM else (first,)
        compare(net, start, moves=moves)


def compare(net: nn.Module, start: tuple[Any, ...], *, moves: bool) -> None:
    x, direction = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    weights = [p.detach() for p in net.parameters()]
    directions = [torch.randn_like(w) for w in weights]
    names = [name for name, _ in net.named_parameters()]

    def loss(x: Tensor, *tensors: Tensor) -> Tensor:
        outputs, ends = functional_call(net, dict(zip(names, tensors, strict=True)), (x, *start))
        ends = ends if isinstance(ends, tuple) else (ends,)
        return outputs.square().sum() + sum(end.sin().sum() for end in ends)

    moved = direction if moves else torch.zeros_like(x)
    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    gradient = torch.autograd.grad(loss(*leaves), leaves)
    expected = sum((g * d).sum() for g, d in zip(gradient, (moved, *directions), strict=True))
    with forward_ad.dual_level():
        duals = [dual(w, d) for w, d in zip(weights, directions, strict=True)]
        with SlopeMode():
            value = loss(dual(x, direction) if moves else x, *duals)
        found = forward_ad.unpack_dual(value)
        torch.testing.assert_close(found.primal, loss(x, *weights), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.tangent, expected, rtol=1e-10, atol=1e-10)


class Weighted(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


LAYERS = {
    "lstm": lambda: (nn.LSTM(3, 4, 2, batch_first=True), 4),
    "lstm, projection": lambda: (nn.LSTM(3, 4, proj_size=2, batch_first=True), 2),
    "gru, both directions": lambda: (nn.GRU(3, 4, bidirectional=True, batch_first=True), 8),
    "rnn": lambda: (nn.RNN(3, 4, batch_first=True), 4),
    "lstm, dropout": lambda: (nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True), 4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scales_data", [False, True])
def test_hypergradients(name: str, scales_data: bool) -> None:
    """The default equals reverse mode, where the upper variables scale losses and where they scale the data."""
    torch.manual_seed(0)
    net = Weighted(*LAYERS[name]()).double()
    weight = nestor.Variable(torch.rand(6, dtype=torch.float64))
    x, y = torch.randn(6, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])

    def lower(net: nn.Module, weight: nn.Module) -> Tensor:
        given = x * weight()[:, None, None] if scales_data else x
        losses = nn.functional.cross_entropy(net(given), y, reduction="none")
        return losses.mean() if scales_data else (losses * weight()).mean()

    def upper(net: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(net(x.flip(0)), y)

    found = {}
    for cross in (None, nestor.ForwardMode(), nestor.ReverseMode()):
        program = nestor.Program(
            net=nestor.Problem(net, lower, response=nestor.T1T2(cross=cross)), weight=nestor.Problem(weight, upper)
        )
        torch.manual_seed(1)
        (found[type(cross).__name__],) = program.hypergradient("weight").values()
    for value in found.values():
        torch.testing.assert_close(value, found["ReverseMode"], rtol=1e-9, atol=1e-12)


def test_packed_sequences_are_left_to_torch() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 6, 3), torch.tensor([6, 5, 3, 1]), batch_first=True)
    net = nn.GRU(3, 5, batch_first=True)
    with torch.no_grad(), SlopeMode():
        found = net(packed)[0].data
    torch.testing.assert_close(found, net(packed)[0].data)
    assert set(CELLS) == {torch.lstm, torch.gru}
