"""The guards of a run: losses that are no functions, steps that replays do not see, hypergradients that are zero."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.callbacks import Callback
from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.explain.peak_memory import PeakMemory
from nestor.levels.function_check import check_function

MODES = ("step", "sqrt", "tree", "none")
Loss = Callable[..., Any]


def weighted(keep: Callable[[], Tensor] | None = None, read: Callable[[Tensor], Tensor] = lambda w: w) -> Loss:
    """Make the loss of weighted samples, with masked samples and weights that are read through a function."""

    def train_loss(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        losses = (net(batch[0]) - batch[1]).square().squeeze(1) * torch.sigmoid(read(weights()))
        return (losses if keep is None else losses * keep()).mean()

    return train_loss


def clean(batch: Any, net: nn.Module) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def program(
    train_loss: Loss,
    response: nestor.Response | None = None,
    upper_loss: Loss = clean,
    net: nn.Module | None = None,
    prepare: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda net, optimizer: None,
    make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
) -> nestor.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) if net is None else net
    net.double()
    weights = nestor.Variable(torch.zeros(8).double())
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    optimizer = make(net.parameters())
    prepare(net, optimizer)
    return nestor.Program(
        net=nestor.Problem(net, train_loss, optimizer=optimizer, data=[(x, y)], response=response, unroll_steps=4),
        weights=nestor.Problem(
            weights, upper_loss, optimizer=torch.optim.Adam(weights.parameters(), 1e-2), data=[(x.flip(0), y)]
        ),
    )


def run(given: nestor.Program, **options: Any) -> dict[str, float]:
    return nestor.Engine(given, seed=0, **options).run(12)


def own_numbers() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand(8, generator=generator).double()


def numbers_of_numpy() -> Callable[[], Tensor]:
    generator = np.random.default_rng(0)
    return lambda: torch.as_tensor(generator.random(8))


def counter() -> Callable[[], Tensor]:
    calls = iter(range(1, 1000))
    return lambda: torch.ones(8).double() / next(calls)


@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.FiniteDifference(), nestor.Unrolled(), nestor.SAMA()])
@pytest.mark.parametrize("keep", [own_numbers, numbers_of_numpy, counter])
def test_a_loss_that_is_no_function_is_refused(keep: Callable[[], Any], response: nestor.Response) -> None:
    given = program(weighted(keep()), response)
    before = [p.detach().clone() for p in given.levels["weights"].parameters]
    with pytest.raises(nestor.NotAFunctionError, match=r"level 'net', loss .*train_loss.* step 4") as raised:
        run(given)
    assert "Engine(check=False)" in str(raised.value)
    for now, then in zip(given.levels["weights"].parameters, before, strict=True):
        assert torch.equal(now, then)
    run(program(weighted(keep()), nestor.T1T2()), check=False)


def test_a_parameter_that_is_read_past_the_arguments_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    weight = net[0].weight  # the parameter itself, which stays the module's own when others are put in its place

    def train_loss(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        return weighted()(batch, net, weights) + weight.square().sum()

    with pytest.raises(nestor.NotAFunctionError, match=r"gradient in variable 0 of level 'net'|value differs"):
        run(program(train_loss, net=net))


class Projection(Callback):
    """Projects the variables after every step."""

    def on_level_step(self, run: Any, level: str) -> None:
        if level == "net":
            with torch.no_grad():
                for parameter in run.states["net"].level.parameters:
                    parameter.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("checkpoint", MODES)
def test_a_projection_between_the_steps_is_found(checkpoint: str) -> None:
    with pytest.raises(nestor.ReplayError, match=r"level 'net'.*projection"):
        run(program(weighted(), nestor.Unrolled(checkpoint=checkpoint)), callbacks=[Projection()])
    run(program(weighted(), nestor.T1T2()), callbacks=[Projection()])
    run(program(weighted(), nestor.Unrolled(checkpoint=checkpoint)), callbacks=[Projection()], check=False)


class Reset(Callback):
    """Sets the optimizer's memory to zero after every third step, through ``data`` or not."""

    def __init__(self, *, through_data: bool) -> None:
        self.through_data, self.steps = through_data, 0

    def on_level_step(self, run: Any, level: str) -> None:
        self.steps += level == "net"
        if level == "net" and self.steps % 3 == 0:
            for slot in run.states["net"].level.problem.optimizer.state.values():
                for key, value in slot.items():
                    if isinstance(value, Tensor) and key != "step":
                        (value.data if self.through_data else value).zero_()


@pytest.mark.parametrize("checkpoint", MODES)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "NAdam", "Adamax"])
@pytest.mark.parametrize("through_data", [True, False])
def test_a_reset_of_the_optimizers_memory_is_found(checkpoint: str, optimizer: str, through_data: bool) -> None:
    """The states before the steps show nothing but the new memory, and the steps from it are replayed as taken."""
    with pytest.raises(nestor.ReplayError, match=r"level 'net'.*a reset"):
        run(
            program(weighted(), nestor.Unrolled(checkpoint=checkpoint), make=OPTIMIZERS[optimizer]),
            callbacks=[Reset(through_data=through_data)],
        )


@pytest.mark.parametrize("checkpoint", ["step", "sqrt", "tree"])
def test_a_tensor_that_moves_along_the_run_is_found(checkpoint: str) -> None:
    teacher = [torch.ones(8).double()]

    class Decay(Callback):
        def on_level_step(self, run: Any, level: str) -> None:
            teacher[0] = teacher[0] * 0.9

    with pytest.raises(nestor.ReplayError, match="level 'net'"):
        run(program(weighted(lambda: teacher[0]), nestor.Unrolled(checkpoint=checkpoint)), callbacks=[Decay()])


class Noisy(nn.Module):
    """BatchNorm and dropout, with a bias whose gradient is rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.relu(self.norm(self.first(x))), 0.3, self.training))


class Attention(nn.Module):
    """Fused attention: the replay runs on other kernels, and the gradient of the key bias is rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x[:, :, None])).mean(1))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
}


@pytest.mark.parametrize("checkpoint", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [Noisy, Attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guards_do_not_raise_falsely(
    make: type[nn.Module], optimizer: str, checkpoint: str, dtype: torch.dtype
) -> None:
    given = program(
        weighted(),
        nestor.Unrolled(checkpoint=checkpoint),
        net=make(),
        make=lambda p: OPTIMIZERS[optimizer](list(p)),
    )
    if dtype == torch.float32:
        data = [tuple(t.float() for t in batch) for batch in given.levels["net"].problem.data]
        net = make().float()
        weights = nestor.Variable(torch.zeros(8))
        given = nestor.Program(
            net=nestor.Problem(
                net,
                weighted(),
                optimizer=OPTIMIZERS[optimizer](list(net.parameters())),
                data=data,
                response=nestor.Unrolled(checkpoint=checkpoint),
                unroll_steps=4,
                clip_norm=0.5,
            ),
            weights=nestor.Problem(weights, clean, optimizer=torch.optim.Adam(weights.parameters(), 1e-2), data=data),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(given)


def test_the_checks_change_nothing() -> None:
    results = []
    for check in (True, False, 2):
        torch.manual_seed(0)
        given = program(weighted(), nestor.Unrolled(), net=Noisy())
        run(given, check=check)
        net = given.levels["net"].problem.module
        results.append([t.clone() for t in (*net.state_dict().values(), *given.levels["weights"].parameters)])
        assert all(p.grad is None for p in net.parameters())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_checks_are_not_counted() -> None:
    counts = []
    for check in (True, False):
        given = program(weighted(), nestor.Unrolled())
        with nestor.diagnostics.count_evaluations(given) as count:
            run(given, check=check)
        counts.append((dict(count.forwards), dict(count.gradients), dict(count.hvps)))
    assert counts[0] == counts[1]


def calls(check: bool | int) -> int:
    made = []

    def train_loss(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        made.append(1)
        return weighted()(batch, net, weights)

    run(program(train_loss), check=check)
    return len(made)


def test_checks_are_made_once_or_every_n_upper_steps() -> None:
    assert calls(True) == calls(False) + 2
    assert calls(1) == calls(False) + 6
    assert calls(2) == calls(False) + 4  # before the first and the third of three upper steps


@pytest.mark.parametrize("check", [-1, 1.5, "yes", None])
def test_check_is_validated(check: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"Engine\(check="):
        nestor.Engine(program(weighted()), check=check)


RESPONSES = [nestor.T1T2(), nestor.FiniteDifference(), nestor.SAMA(), nestor.Unrolled(), nestor.Implicit(damping=1.0)]


@pytest.mark.parametrize("response", RESPONSES, ids=lambda r: r.describe())
@pytest.mark.parametrize("read", [torch.Tensor.detach, lambda w: torch.tensor(w.tolist()).double(), lambda w: w.data])
def test_a_hypergradient_that_is_zero_by_structure_is_refused(read: Any, response: nestor.Response) -> None:
    given = program(weighted(read=read), response)
    with pytest.raises(nestor.LossError, match=r"level 'weights'.*zero by structure.*'net'.*train_loss"):
        run(given)


def test_only_a_direct_gradient_warns() -> None:
    def upper_loss(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        return clean(batch, net) + weights().square().sum() + weights().sum()

    with pytest.warns(nestor.NestorWarning, match="only its direct gradient moves it"):
        metrics = run(program(weighted(read=torch.Tensor.detach), upper_loss=upper_loss))
    assert metrics["weights/indirect_share"] == 0.0


def test_an_upper_loss_that_detaches_the_response_is_refused() -> None:
    with pytest.raises(nestor.LossError, match=r"zero by structure.*does not depend on the best responses"):
        run(
            program(
                weighted(),
                upper_loss=lambda batch, net, weights: (
                    clean(batch, copy.deepcopy(net)) * 0 + 0 * weights().sum().detach()
                ),
            )
        )


def test_the_share_of_the_responses() -> None:
    def upper_loss(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        return clean(batch, net) + 0.1 * (weights() - 1).square().sum()

    given = program(weighted(), nestor.T1T2(), upper_loss)
    engine = nestor.Engine(given, seed=0)
    shares = []

    class Reads(Callback):
        def on_level_step(self, run: Any, level: str) -> None:
            if level == "weights":
                shares.append(run.read_metrics()["weights/indirect_share"])

    engine = nestor.Engine(given, seed=0, callbacks=[Reads()])
    total = engine.program.levels["weights"].parameters[0].detach().clone()
    engine.run(3)
    # The fourth step changes the lower level, then the upper level steps: its parts by hand, at that point.
    net, (x, y) = given.levels["net"].problem.module, given.levels["net"].problem.data[0]
    (vx, vy) = given.levels["weights"].problem.data[0]
    before = copy.deepcopy(net.state_dict())
    engine.run(1)
    w = total.requires_grad_()
    cotangent = torch.autograd.grad(clean((vx, vy), net), list(net.parameters()))
    inner = weighted()((x, y), net, lambda: w)
    gradient = torch.autograd.grad(inner, list(net.parameters()), create_graph=True)
    indirect = torch.autograd.grad(gradient, w, [-c for c in cotangent])[0]
    direct = 0.2 * (w.detach() - 1)
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert shares[0] == pytest.approx(float(indirect.norm() / (indirect.norm() + direct.norm())), rel=1e-12)


def test_differences_through_a_detach_warn() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, losses: Tensor) -> Tensor:
            return torch.sigmoid(self.inner(losses))

    def train_loss(batch: Any, net: nn.Module, weights: nn.Module) -> Tensor:
        losses = (net(batch[0]) - batch[1]).square()
        return (weights(losses.detach()) * losses).mean()

    def built(response: nestor.Response) -> nestor.Program:
        torch.manual_seed(0)
        net, weights = nn.Linear(3, 1).double(), Net().double()
        x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
        return nestor.Program(
            net=nestor.Problem(
                net, train_loss, optimizer=torch.optim.SGD(net.parameters(), 0.1), data=[(x, y)], response=response
            ),
            weights=nestor.Problem(
                weights, clean, optimizer=torch.optim.Adam(weights.parameters(), 1e-2), data=[(x.flip(0), y)]
            ),
        )

    with pytest.warns(nestor.NestorWarning, match="FiniteDifference of 'net' differs .* detach") as caught:
        run(built(nestor.FiniteDifference()))
    assert len(caught) == 1
    run(built(nestor.T1T2()))
    run(built(nestor.FiniteDifference()), check=False)


def test_check_loss_by_hand() -> None:
    good, bad = program(weighted()), program(weighted(own_numbers()))
    batch = good.levels["net"].problem.data[0]
    state = torch.get_rng_state()
    nestor.diagnostics.check_loss(good, "net", {"net": batch})
    nestor.diagnostics.check_loss(good, "weights", {"weights": batch})
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(nestor.NotAFunctionError, match="level 'net'"):
        nestor.diagnostics.check_loss(bad, "net", {"net": batch})
    with pytest.raises(ValueError, match="takes a batch"):
        nestor.diagnostics.check_loss(good, "net", {})
    with pytest.raises(ValueError, match="no level 'nte'"):
        nestor.diagnostics.check_loss(good, "nte", {"net": batch})


def three_levels(bottom: nestor.Response, nesting: str, reads: Callable[[], float] = lambda: 1.0) -> nestor.Program:
    """A chain whose middle level is unrolled by the top one."""
    torch.manual_seed(0)
    net, middle, top = (
        nn.Linear(3, 1).double(),
        nestor.Variable(torch.zeros(8).double()),
        nestor.Variable(torch.zeros(8).double()),
    )
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def inner(net: nn.Module, middle: nn.Module, top: nn.Module) -> Tensor:
        losses = (net(x) - y).square().squeeze(1)
        return (torch.sigmoid(middle() + top()) * losses).mean() + 0.1 * net.weight.square().sum()

    def between(net: nn.Module, middle: nn.Module, top: nn.Module) -> Tensor:
        return reads() * clean((x.flip(0), y), net) + 0.1 * (middle() - top()).square().sum()

    return nestor.Program(
        nesting=nesting,
        net=nestor.Problem(net, inner, optimizer=torch.optim.SGD(net.parameters(), 0.1), response=bottom),
        middle=nestor.Problem(
            middle,
            between,
            optimizer=torch.optim.SGD(middle.parameters(), 0.1, momentum=0.9),
            response=nestor.Unrolled(),
            unroll_steps=2,
        ),
        top=nestor.Problem(
            top, lambda net, middle: clean((x.flip(1), y), net), optimizer=torch.optim.Adam(top.parameters(), 1e-2)
        ),
    )


BOTTOMS = {
    "T1T2": nestor.T1T2(),
    "CG": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=2), damping=0.1),
    "warm": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=2), damping=0.1, warm_start=True),
    "Unrolled": nestor.Unrolled(),
    "ES": nestor.EvolutionStrategies(samples=2),
}


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize("bottom", BOTTOMS)
def test_levels_in_the_middle_are_replayed_as_taken(bottom: str, nesting: str) -> None:
    program = three_levels(BOTTOMS[bottom], nesting)
    if (bottom, nesting) == ("ES", "exact"):
        with pytest.raises(nestor.NestorError, match=r"level 'net'.*no derivative.*nesting=.frozen"):
            run(program)
    else:
        run(program)


@pytest.mark.parametrize("bottom", ["T1T2", "CG", "Unrolled"])
def test_a_change_at_a_middle_level_is_found(bottom: str) -> None:
    factor = [1.0]

    class Decay(Callback):
        def on_level_step(self, run: Any, level: str) -> None:
            if level == "middle":
                factor[0] *= 0.9

    with pytest.raises(nestor.ReplayError, match="level 'middle'"):
        run(three_levels(BOTTOMS[bottom], "exact", lambda: factor[0]), callbacks=[Decay()])


def test_the_function_check_fits_beside_a_large_level() -> None:
    """It holds neither two gradients nor a second copy of all variables of a level of many millions."""
    net = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(8)))
    weight = nestor.Variable(torch.ones(4))
    x = torch.randn(4, 1500)

    def lower(net: nn.Module, weight: nn.Module) -> Tensor:
        return (weight() * net(x).square().mean(1)).mean()

    program = nestor.Program(
        net=nestor.Problem(net, lower), weight=nestor.Problem(weight, lambda net: net(x).square().mean())
    )
    level = program.levels["net"]
    with PeakMemory() as memory:
        check_function(level, Draw(None, Captured.now()))
    size = sum(p.nbytes for p in net.parameters())
    assert memory.peak < 1.2 * size  # half of the variables, one gradient, and its projection
