"""Batches, losses and level names of every kind."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

ByHand = Callable[..., dict[str, Tensor]]
Error = Callable[[dict[str, Tensor], dict[str, Tensor]], float]
Loss = Callable[..., Any]


class Named(NamedTuple):
    """A batch with named fields."""

    x: Tensor
    y: Tensor


Old = namedtuple("Old", ["x", "y"])


@dataclass(frozen=True)
class Data:
    """A batch that is a dataclass, frozen and nested."""

    x: Tensor
    rest: dict[str, Tensor]

    @property
    def y(self) -> Tensor:
        """The labels."""
        return self.rest["y"]


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    """A small network and the logarithms of the weights of eight examples."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return {"net": net, "weights": nestor.Variable(torch.linspace(-1, 1, 8, dtype=torch.float64))}


@pytest.fixture
def batches() -> dict[str, tuple[Tensor, Tensor]]:
    """A batch for each level."""
    return {name: (torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))) for name in ("net", "weights")}


def train_loss(batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
    x, y = batch
    return (weights().exp() * F.cross_entropy(net(x), y, reduction="none")).mean()


def valid_loss(batch: tuple[Tensor, Tensor], net: nn.Module) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.fixture
def wanted(modules: dict[str, nn.Module], batches: dict[str, Any], by_hand: ByHand) -> dict[str, Tensor]:
    """The T1-T2 hypergradient by hand."""
    return by_hand(modules, train_loss, valid_loss, batches["net"], batches["weights"])


def hypergradient(
    modules: dict[str, nn.Module], train: Loss, valid: Loss, batches: dict[str, Any]
) -> dict[str, Tensor]:
    program = nestor.Program(
        net=nestor.Problem(modules["net"], train), weights=nestor.Problem(modules["weights"], valid)
    )
    return program.hypergradient("weights", batches)


# Batches

BATCHES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "list": (lambda x, y: [x, y], lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "ordered": (lambda x, y: OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "nested": (lambda x, y: {"inputs": (x, [None, "text"]), "y": y}, lambda b: (b["inputs"][0], b["y"])),
    "NamedTuple": (Named, lambda b: (b.x, b.y)),
    "namedtuple": (Old, lambda b: (b.x, b.y)),
    "dataclass": (lambda x, y: Data(x, {"y": y}), lambda b: (b.x, b.y)),
    "tensor": (lambda x, y: torch.cat([x, y[:, None].double()], 1), lambda b: (b[:, :5], b[:, 5].long())),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches(
    kind: str,
    modules: dict[str, nn.Module],
    batches: dict[str, Any],
    wanted: dict[str, Tensor],
    relative_error: Error,
) -> None:
    """A loss gets the batch as it is, in a hypergradient and in a run."""
    pack, unpack = BATCHES[kind]
    packed = {name: pack(*batch) for name, batch in batches.items()}
    seen: list[Any] = []

    def train(batch: Any, net: nn.Module, weights: nestor.Variable) -> Tensor:
        seen.append(batch)
        return train_loss(unpack(batch), net, weights)

    def valid(batch: Any, net: nn.Module) -> Tensor:
        return valid_loss(unpack(batch), net)

    assert relative_error(hypergradient(modules, train, valid, packed), wanted) < 1e-12
    net, weights = modules["net"], modules["weights"]
    assert isinstance(weights, nestor.Variable)
    start = weights.value.detach().clone()
    program = nestor.Program(
        # Learning rate 0: the upper step is the hypergradient at the start.
        net=nestor.Problem(net, train, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), data=[packed["net"]]),
        weights=nestor.Problem(
            weights, valid, optimizer=torch.optim.SGD(weights.parameters(), lr=1.0), data=[packed["weights"]]
        ),
    )
    nestor.Engine(program, seed=0).run(1)
    assert all(batch is packed["net"] for batch in seen)
    assert relative_error({"value": start - weights.value}, wanted) < 1e-12


def test_levels_without_batches(modules: dict[str, nn.Module], batches: dict[str, Any], wanted: Any) -> None:
    """Losses of no batch close over their data."""

    def train(net: nn.Module, weights: nestor.Variable) -> Tensor:
        return train_loss(batches["net"], net, weights)

    def valid(net: nn.Module) -> Tensor:
        return valid_loss(batches["weights"], net)

    got = hypergradient(modules, train, valid, {})
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)


# Losses


class Task:
    """Losses as methods, with options as attributes."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def train(self, batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
        """Weight the examples."""
        return self.factor * train_loss(batch, net, weights)

    @staticmethod
    def static(batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
        """Do the same without an object."""
        return train_loss(batch, net, weights)

    @classmethod
    def of_class(cls, batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
        """Do the same on the class."""
        return train_loss(batch, net, weights)

    def __call__(self, batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
        """Be a loss."""
        return self.train(batch, net, weights)


class Net(nn.Module):
    """A network that knows its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        """Run the body."""
        out: Tensor = self.body(x)
        return out

    def loss(self, batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
        """Read ``self``, which is the level ``net``."""
        return train_loss(batch, self, weights)


class LossModule(nn.Module):
    """A loss that is a module, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    def forward(self, batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
        """Weight the examples."""
        loss: Tensor = self.factor * train_loss(batch, net, weights)
        return loss


def with_options(
    batch: tuple[Tensor, Tensor],
    net: nn.Module,
    weights: nestor.Variable,
    factor: float = 1.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    assert reduction == "mean"
    return factor * train_loss(batch, net, weights)


def reordered(factor: float, batch: tuple[Tensor, Tensor], weights: nestor.Variable, net: nn.Module) -> Tensor:
    return factor * train_loss(batch, net, weights)


@functools.wraps(train_loss)
def wrapped(*args: Any, **kwargs: Any) -> Tensor:
    return train_loss(*args, **kwargs)


LOSSES: dict[str, Loss] = {
    "function": train_loss,
    "lambda": lambda batch, net, weights: train_loss(batch, net, weights),
    "bound method": Task().train,
    "static method": Task.static,
    "class method": Task.of_class,
    "callable object": Task(),
    "module": LossModule(),
    "options": with_options,
    "partial": functools.partial(reordered, 1.0),
    "partial of partial": functools.partial(functools.partial(with_options, factor=1.0), reduction="mean"),
    "partial of a method": functools.partial(Task(1.0).train),
    "wrapped": wrapped,
    "mapping": lambda batch, net, weights: {"loss": train_loss(batch, net, weights), "extra": 1.0},
    "one element": lambda batch, net, weights: train_loss(batch, net, weights).reshape(1, 1),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(
    kind: str,
    modules: dict[str, nn.Module],
    batches: dict[str, Any],
    wanted: dict[str, Tensor],
    relative_error: Error,
) -> None:
    """Any callable whose signature can be read; called by hand with plain modules it gives the same number."""
    loss = LOSSES[kind]
    value = loss(batches["net"], net=modules["net"], weights=modules["weights"])
    value = value["loss"] if isinstance(value, dict) else value
    program = nestor.Program(
        net=nestor.Problem(modules["net"], loss), weights=nestor.Problem(modules["weights"], valid_loss)
    )
    assert torch.equal(value.reshape(()), program.objective("net", {"net": batches["net"]}))
    assert relative_error(program.hypergradient("weights", batches), wanted) < 1e-12
    assert program.levels["net"].loss.where


def test_loss_that_is_a_method_of_its_module(
    modules: dict[str, nn.Module], batches: dict[str, Any], by_hand: ByHand, relative_error: Error
) -> None:
    """``self`` is the level's module, and sees the tensors of the evaluation."""
    modules = {**modules, "net": Net()}
    wanted = by_hand(modules, train_loss, valid_loss, batches["net"], batches["weights"])
    got = hypergradient(modules, modules["net"].loss, valid_loss, batches)
    assert relative_error(got, wanted) < 1e-12


def test_a_loss_module_is_no_level(modules: dict[str, nn.Module], batches: dict[str, Any]) -> None:
    """Parameters of a module that is a loss belong to no level: they are constants, and keep their ``.grad``."""

    class Learned(LossModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
            loss: Tensor = self.scale * train_loss(batch, net, weights)
            return loss

    loss = Learned()
    got = hypergradient(modules, loss, valid_loss, batches)
    assert list(got) == ["value"]
    assert loss.scale.grad is None


# Names of levels

NAMES = [
    "module", "forward", "optimizer", "loss", "train", "training", "parameters", "data", "args", "input", "call",
    "kwargs", "level", "levels", "name", "reader", "_loss", "_arguments", "apply", "eval", "T_destination", "dump",
]  # fmt: skip


def losses_of(lower: str, upper: str) -> tuple[Loss, Loss]:
    """Write losses whose arguments have these names."""
    namespace: dict[str, Any] = {"train_loss": train_loss, "valid_loss": valid_loss}
    exec(  # an argument is the name of a level
        f"def low(batch, {lower}, {upper}): return train_loss(batch, {lower}, {upper})\n"
        f"def up(batch, {lower}): return valid_loss(batch, {lower})",
        namespace,
    )
    return namespace["low"], namespace["up"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["lower", "upper"])
def test_names_of_levels(
    place: str,
    name: str,
    modules: dict[str, nn.Module],
    batches: dict[str, Any],
    wanted: dict[str, Tensor],
    relative_error: Error,
) -> None:
    """A level may be called as attributes of modules, problems and programs are."""
    lower, upper = (name, "weights") if place == "lower" else ("net", name)
    low, up = losses_of(lower, upper)
    net, weights = modules["net"], modules["weights"]
    assert isinstance(weights, nestor.Variable)
    program = nestor.Program(
        **{
            lower: nestor.Problem(net, low, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), data=[batches["net"]]),
            upper: nestor.Problem(
                weights, up, optimizer=torch.optim.SGD(weights.parameters(), lr=1.0), data=[batches["weights"]]
            ),
        }
    )
    got = program.hypergradient(upper, {lower: batches["net"], upper: batches["weights"]})
    assert relative_error(got, wanted) < 1e-12
    assert name in str(program.to_mermaid())
    start = weights.value.detach().clone()
    metrics = nestor.Engine(program, seed=0).run(1)
    assert f"{name}/loss" in metrics
    assert relative_error({"value": start - weights.value}, wanted) < 1e-12
