"""A module that is changed during a run: what the engine would not train is named."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import nestor
from nestor.callbacks import Callback


class Change(Callback):
    """Changes the module of the lower level after some steps."""

    def __init__(self, change: Callable[[nn.Sequential], object], at: int) -> None:
        self.change, self.at, self.seen = change, at, 0

    def on_level_step(self, engine: nestor.Engine, level: str) -> None:
        self.seen += level == "net"
        if level == "net" and self.seen == self.at:
            self.change(engine.program.levels["net"].problem.module)


def program(response: nestor.Response) -> nestor.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    net[0].bias.requires_grad_(False)
    weights = nestor.Variable(torch.zeros(8).double())
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def fit(net: nn.Module, weights: nestor.Variable) -> Tensor:
        return (torch.sigmoid(weights()) * (net(x) - y).square().squeeze(1)).mean()

    return nestor.Program(
        net=nestor.Problem(
            net, fit, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), unroll_steps=2, response=response
        ),
        weights=nestor.Problem(
            weights, lambda net: F.mse_loss(net(-x), y), optimizer=torch.optim.SGD(weights.parameters(), lr=1.0)
        ),
    )


def replace_layer(net: nn.Sequential) -> None:
    net[0] = copy.deepcopy(net[0])


def replace_parameter(net: nn.Sequential) -> None:
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "unfrozen": (lambda net: net[0].bias.requires_grad_(True), r"unfrozen: '0\.bias' of level"),
    "pruned": (
        lambda net: prune.random_unstructured(net[0], "weight", 0.5),
        r"replaced: '0\.weight' of level",
    ),
    "parametrized": (
        lambda net: parametrizations.weight_norm(net[2]),
        r"replaced: '2' of level|'2\.weight'",
    ),
    "layer": (replace_layer, "replaced: '0' of level"),
    "parameter": (replace_parameter, r"replaced: '2\.weight' of level"),
    "frozen": (lambda net: net[0].weight.requires_grad_(False), r"frozen: '0\.weight' of level"),
}


@pytest.mark.filterwarnings("ignore:Engine.compile=True")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("at", [1, 2, 7])
@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.FiniteDifference(), nestor.Unrolled()], ids=repr)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_module_is_refused(name: str, response: nestor.Response, at: int, compile: bool) -> None:
    change, message = CHANGES[name]
    with pytest.raises(nestor.LossError, match=message):
        nestor.Engine(program(response), seed=0, compile=compile, callbacks=[Change(change, at)]).run(8)


def test_changes_that_are_none() -> None:
    """Values, modes, buffers and hooks of a module may change; a program of the changed module is a new program."""

    def change(net: nn.Sequential) -> None:
        net.eval()
        net.train()
        net.load_state_dict(net.state_dict())

    given = program(nestor.T1T2())
    nestor.Engine(given, seed=0, callbacks=[Change(change, 3)]).run(8)
    net = given.levels["net"].problem.module
    net[0].bias.requires_grad_(True)
    problem = nestor.Problem(net, given.levels["net"].problem.loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    before = net[0].bias.detach().clone()
    nestor.Engine(nestor.Program(net=problem, weights=given.levels["weights"].problem), seed=0).run(2)
    assert not torch.equal(net[0].bias.detach(), before)
