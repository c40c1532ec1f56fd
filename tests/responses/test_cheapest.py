"""The default mixed derivative: which method it takes, and that it equals reverse mode on every kind of model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.diagnostics import count_evaluations

Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    """The last output of a GRU or an LSTM over the rows of an image."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.squeeze(1))[0][:, -1])


class Encoder(nn.Module):
    """Two transformer layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.squeeze(1)).mean(1))


class Residual(nn.Module):
    """A convolution and a residual block with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4))
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)]), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        y = F.relu(self.norms[1](self.second(x)))
        return self.head(F.relu(x + self.norms[2](self.third(y))).mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
    "cnn": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    "residual": Residual,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "transformer": Encoder,
    "wide": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 2800), nn.ReLU(), nn.Linear(2800, 3)),
}
REVERSE = ("linear", "mlp")


class Upper(nn.Module):
    """A weighting network, a decay, a scale of the data and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
        self.decay, self.scale = nn.Parameter(torch.tensor(-3.0)), nn.Parameter(torch.rand(6))


def weighted(batch: Batch, net: nn.Module, upper: Any) -> Tensor:
    losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    return (upper.weigh(losses.detach()[:, None])[:, 0].sigmoid() * losses).mean()


def weighted_by_the_loss_itself(batch: Batch, net: nn.Module, upper: Any) -> Tensor:
    losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    return (torch.sigmoid(upper.weigh(losses[:, None])[:, 0]) * losses).mean()


def decayed(batch: Batch, net: nn.Module, upper: Any) -> Tensor:
    penalty = sum(p.square().sum() for p in net.parameters() if p.requires_grad)
    return F.cross_entropy(net(batch[0]), batch[1]) + 0.5 * upper.decay.exp() * penalty


def scaled_data(batch: Batch, net: nn.Module, upper: Any) -> Tensor:
    return F.cross_entropy(net(batch[0] * upper.scale), batch[1])


def everything(batch: Batch, net: nn.Module, upper: Any) -> Tensor:
    return weighted(batch, net, upper) + decayed(batch, net, upper) * scaled_data(batch, net, upper)


LOSSES = [weighted, weighted_by_the_loss_itself, decayed, scaled_data, everything]


def judge(batch: Batch, net: nn.Module) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def batches(seed: int, count: int = 1, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(size) % 3)
        for _ in range(count)
    ]


def program_of(model: str, loss: Callable[..., Tensor], cross: nestor.CrossDerivative | None = None) -> nestor.Program:
    torch.manual_seed(0)
    net, upper = MODELS[model]().double(), Upper().double()
    return nestor.Program(
        net=nestor.Problem(
            net,
            loss,
            data=batches(1, 3),
            optimizer=torch.optim.SGD(net.parameters(), 0.05, 0.9),
            response=nestor.T1T2(cross=cross),
        ),
        upper=nestor.Problem(upper, judge, data=batches(2, 2), optimizer=torch.optim.Adam(upper.parameters(), 0.01)),
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_equals_reverse_mode(model: str, loss: Callable[..., Tensor]) -> None:
    given = {"net": batches(1)[0], "upper": batches(2)[0]}
    found = program_of(model, loss).hypergradient("upper", given)
    forward = program_of(model, loss, nestor.ForwardMode()).hypergradient("upper", given)
    expected = program_of(model, loss, nestor.ReverseMode()).hypergradient("upper", given)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(forward[name], value, rtol=1e-9, atol=1e-13)


def method(model: str, loss: Callable[..., Tensor]) -> str:
    memory = program_of(model, loss).explain({"net": batches(1)[0], "upper": batches(2)[0]}).memory
    assert memory is not None
    return memory.mixed["net"]


@pytest.mark.parametrize("model", MODELS)
def test_the_rule(model: str) -> None:
    """Separable losses: forward mode where weights are shared, and from 100,000 variables on."""
    expected = "reverse over reverse" if model in REVERSE else "reverse over forward"
    assert method(model, weighted) == expected
    assert method(model, decayed) == expected
    # The scale of the data meets the variables in every layer.
    assert method(model, scaled_data) == ("forward over reverse" if model == "wide" else "reverse over reverse")


def test_the_table_says_it() -> None:
    table = str(program_of("cnn", weighted).explain({"net": batches(1)[0], "upper": batches(2)[0]}))
    assert "reverse over" in table


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_the_choice_is_not_counted(model: str) -> None:
    program = program_of(model, weighted)
    engine = nestor.Engine(program, seed=0, check=False)
    with count_evaluations(program) as first:
        engine.run(1)
    with count_evaluations(program) as second:
        engine.run(1)
    assert first.forwards == second.forwards == {"net": 2, "upper": 1}
    assert first.methods == second.methods


@pytest.mark.parametrize("model", ["cnn", "mlp", "gru"])
def test_a_resumed_run_takes_the_same_method(model: str, tmp_path: Path) -> None:
    whole, first, second = (program_of(model, weighted) for _ in range(3))
    nestor.Engine(whole, seed=0).run(6)
    nestor.Engine(first, seed=0, callbacks=[nestor.callbacks.Checkpoint(tmp_path, every=3)]).run(3)
    nestor.Engine(second, seed=0, callbacks=[nestor.callbacks.Checkpoint(tmp_path, every=3)]).run(6, resume="latest")
    for one, other in zip(whole.levels["upper"].parameters, second.levels["upper"].parameters, strict=True):
        assert torch.equal(one, other)
