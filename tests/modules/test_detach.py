"""``detach()`` inside a lower loss means what it says: the derivative is that of the loss as written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

ByHand = Callable[..., dict[str, Tensor]]
Error = Callable[[dict[str, Tensor], dict[str, Tensor]], float]
Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    """The last state of a recurrent layer, classified."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        logits: Tensor = self.head(self.layer(x)[0][:, -1])
        return logits


class Transformer(nn.Module):
    """An encoder layer with dropout, averaged over positions and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        logits: Tensor = self.head(self.layer(x).mean(1))
        return logits


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
    )


@dataclass(frozen=True)
class Case:
    """A network and the shape of one input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    train: bool = True


CASES = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)), (6,)),
    # Above the border at which the default goes forward.
    "wide-mlp": Case(lambda: nn.Sequential(nn.Linear(6, 1000), nn.Tanh(), nn.Linear(1000, 4)), (6,)),
    "dropout": Case(lambda: nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Dropout(0.4), nn.Linear(20, 4)), (6,)),
    "cnn": Case(cnn, (1, 8, 8)),
    "cnn-eval": Case(cnn, (1, 8, 8), train=False),
    "gru": Case(lambda: Recurrent(nn.GRU(3, 6, batch_first=True)), (5, 3)),
    "gru-two-layers": Case(lambda: Recurrent(nn.GRU(3, 4, 2, batch_first=True, dropout=0.3)), (5, 3)),
    "lstm": Case(lambda: Recurrent(nn.LSTM(3, 6, batch_first=True)), (5, 3)),
    "lstm-eval": Case(lambda: Recurrent(nn.LSTM(3, 6, batch_first=True)), (5, 3), train=False),
    "transformer": Case(Transformer, (6, 16)),
    "transformer-eval": Case(Transformer, (6, 16), train=False),
}
CROSS = {"default": None, "forward": nestor.ForwardMode(), "reverse": nestor.ReverseMode()}


def weighted(net: nn.Module, weights: nn.Module, batch: Batch, *, detach: bool) -> Tensor:
    x, y = batch
    losses = F.cross_entropy(net(x), y, reduction="none")
    seen = losses.detach() if detach else losses
    return (weights(seen[:, None]).squeeze(1) * losses).mean()


def train_loss(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
    return weighted(net, weights, batch, detach=True)


def attached_loss(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
    return weighted(net, weights, batch, detach=False)


def clean_loss(batch: Batch, net: nn.Module) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def build(case: Case) -> tuple[dict[str, nn.Module], dict[str, Batch]]:
    """The network of a case beside a small weighting network, and a batch for each."""
    net = case.make().double().train(case.train)
    weights = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid()).double()
    with torch.no_grad():
        weights[0].weight.mul_(3)  # weights that depend on the loss they read
        weights[2].weight.mul_(3)
    batches = {
        name: (torch.randn(8, *case.shape, dtype=torch.float64), torch.randint(0, 4, (8,)))
        for name in ("net", "weights")
    }
    return {"net": net, "weights": weights}, batches


def hypergradient(
    modules: dict[str, nn.Module],
    batches: dict[str, Batch],
    response: nestor.Response | None,
    loss: Callable[..., Tensor] = train_loss,
) -> dict[str, Tensor]:
    program = nestor.Program(
        net=nestor.Problem(modules["net"], loss, response=response),
        weights=nestor.Problem(modules["weights"], clean_loss),
    )
    torch.manual_seed(7)
    return program.hypergradient("weights", batches)


@pytest.mark.parametrize("loss", [train_loss, attached_loss], ids=["detached", "attached"])
@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("name", CASES)
def test_mixed_derivative_of_the_loss_as_written(
    name: str, cross: str, loss: Callable[..., Tensor], by_hand: ByHand, relative_error: Error
) -> None:
    """Double backward by hand, dropout on the same mask; any fallback would warn and fail."""
    modules, batches = build(CASES[name])
    response = None if cross == "default" else nestor.T1T2(cross=CROSS[cross])
    wanted = by_hand(modules, loss, clean_loss, batches["net"], batches["weights"], seed=7)
    assert relative_error(hypergradient(modules, batches, response, loss), wanted) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "lstm", "transformer"])
def test_implicit_differentiation_respects_detach(name: str, by_hand: ByHand, relative_error: Error) -> None:
    """The residual is the gradient of the loss as written, and its Jacobian is that of the residual."""
    modules, batches = build(CASES[name])
    response = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=300, rtol=1e-13), damping=10.0)
    got = hypergradient(modules, batches, response, attached_loss)
    wanted = by_hand(modules, attached_loss, clean_loss, batches["net"], batches["weights"], seed=7, damping=10.0)
    assert relative_error(got, wanted) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "lstm", "transformer"])
def test_finite_difference_does_not_respect_detach(name: str, by_hand: ByHand, relative_error: Error) -> None:
    """It perturbs the detached losses too, as its docstring says: it differentiates the loss without the detach."""
    modules, batches = build(CASES[name])
    # A short step: ReLU and max-pooling have kinks.
    got = hypergradient(modules, batches, nestor.FiniteDifference(rel_step=1e-5))
    as_written = by_hand(modules, train_loss, clean_loss, batches["net"], batches["weights"], seed=7)
    without_detach = by_hand(modules, attached_loss, clean_loss, batches["net"], batches["weights"], seed=7)
    assert relative_error(got, as_written) > 0.1
    assert relative_error(got, without_detach) < 1e-5
    assert "detach" in (nestor.FiniteDifference.__doc__ or "")
    assert "detach" in (nestor.CentralDifference.__doc__ or "")


@pytest.mark.parametrize("name", ["mlp", "dropout", "gru", "lstm", "transformer"])
def test_finite_difference_agrees_without_detach(name: str, relative_error: Error) -> None:
    """At its default step, on smooth networks, float64."""
    modules, batches = build(CASES[name])
    exact = hypergradient(modules, batches, nestor.T1T2(), attached_loss)
    assert relative_error(hypergradient(modules, batches, nestor.FiniteDifference(), attached_loss), exact) < 1e-3


def test_forward_mode_where_warnings_are_errors() -> None:
    """Loading torch's forward-mode rules warns of a deprecation in torch; a run under ``-W error`` survives that."""
    script = (
        "import torch, nestor\n"
        "net, w = torch.nn.Linear(2, 1), nestor.Variable(torch.zeros(()))\n"
        "low = nestor.Problem(net, lambda x, net, w: w().exp() * net(x).square().mean(),\n"
        "                     response=nestor.T1T2(cross=nestor.ForwardMode()))\n"
        "up = nestor.Problem(w, lambda x, net: (net(x) - 1).square().mean())\n"
        "x = torch.ones(3, 2)\n"
        "print(nestor.Program(net=low, w=up).hypergradient('w', {'net': x, 'w': x}))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("cross", ["default", "forward", "reverse"])
def test_no_grad_block_is_a_constant(cross: str, by_hand: ByHand, relative_error: Error) -> None:
    """``torch.no_grad`` inside a loss is a detach as well."""

    def loss(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        x, y = batch
        with torch.no_grad():
            seen = F.cross_entropy(net(x), y, reduction="none")
        return (weights(seen[:, None]).squeeze(1) * F.cross_entropy(net(x), y, reduction="none")).mean()

    modules, batches = build(CASES["mlp"])
    wanted = by_hand(modules, train_loss, clean_loss, batches["net"], batches["weights"], seed=7)
    got = hypergradient(modules, batches, nestor.T1T2(cross=CROSS[cross]), loss)
    assert relative_error(got, wanted) < 1e-10
