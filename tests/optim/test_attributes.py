"""Optimizers of one's own, with attributes: their steps are differentiated as they are, or refused by name."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import nestor
from nestor.optim import functional_step
from nestor.optim.functional_step import is_elementwise

pytestmark = pytest.mark.usefixtures("double")


class Own(SGD):
    """Changes the gradients, then descends."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)

    def held(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def change(self) -> None:
        raise NotImplementedError

    def step(self, closure: Any = None) -> Any:
        self.change()
        return super().step(closure)


class Scaled(Own):
    """Attributes of several kinds that no step changes."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.eps, self.sizes, self.half = [1e-3, 2.0], {"scale": torch.tensor(0.5)}, 0.5
        self.function = lambda g: g / (g.abs() + self.eps[1])

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = self.function(p.grad) * self.sizes["scale"] * self.half


class Slotted(Own):
    """Slots, and a pickled form without them."""

    __slots__ = ("scale",)

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.scale = 0.5

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad * self.scale


class Counter(Own):
    """A number that every step changes."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.count = 0

    def change(self) -> None:
        self.count += 1
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad / self.count


class GroupCounter(Own):
    """One that is kept in the parameter groups, from the first step on."""

    def change(self) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.grad = p.grad / group["k"]


class Warm(Adam):
    """A learning rate that the step itself changes."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, eps=0.01)
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 * self.count
        return super().step(closure)


class LayerWise(Optimizer):
    """Lamb: the length of a step follows the length of the parameters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.limit = 10.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["first"], state["second"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                state["first"] = 0.9 * state["first"] + 0.1 * p.grad
                state["second"] = 0.99 * state["second"] + 0.01 * p.grad**2
                direction = state["first"] / (1 - 0.9 ** state["step"]) / (state["second"].sqrt() + 1e-3)
                ratio = p.norm().clamp(0, self.limit) / direction.norm()
                p.copy_(p - group["lr"] * ratio * direction)


class TensorCounter(Counter):
    """A tensor as counter: no number."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.count = torch.tensor(0)  # type: ignore[assignment]


class Average(Own):
    """Memory of the parameters outside of the state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.average = {p: torch.zeros_like(p) for p in self.held()}

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            self.average[p].mul_(0.9).add_(p.grad)
            p.grad = self.average[p].clone()


class Global(Own):
    """A state that belongs to no parameter."""

    def change(self) -> None:
        self.state["k"] = self.state["k"] + 1 if isinstance(self.state.get("k"), int) else 1  # type: ignore[index]


class Lion(Optimizer):
    """Like lion-pytorch: everything under no_grad."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.beta = 0.9

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.add_(average.mul(self.beta).add(p.grad, alpha=0.1).sign_(), alpha=-group["lr"])
                average.lerp_(p.grad, 0.1)


class Partial(Own):
    """Only the change of the gradients is under no_grad."""

    @torch.no_grad()
    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad * 0.5


class Data(Own):
    """Changes ``.data``."""

    def change(self) -> None:
        for p in self.held():
            p.data.mul_(0.9)


class Number(Own):
    """Reads the norm as a Python number."""

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad / float(p.grad.norm())


class Noise(Own):
    """Langevin dynamics."""

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad + torch.randn_like(p)


class Seeded(Own):
    """Random numbers of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.generator = torch.Generator().manual_seed(0)

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad * torch.rand(p.shape, generator=self.generator)


class Wrapper(Own):
    """Steps another optimizer."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.base = Adam(self.held(), lr=lr)

    def step(self, closure: Any = None) -> Any:
        return self.base.step()


class Learning(Own):
    """An attribute that another level might learn."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def change(self) -> None:
        for p in self.held():
            assert p.grad is not None
            p.grad = p.grad * self.scale.item()


RIGHT: list[Any] = [Scaled, Slotted, Counter, GroupCounter, Warm, LayerWise]
REFUSED: list[tuple[Any, str]] = [
    (TensorCounter, "changes its attribute 'count'"),
    (Average, "changes its attribute 'average'"),
    (Global, "keeps a state under 'k'"),
    (Lion, "computes under no_grad"),
    (Partial, "computes under no_grad"),
    (Data, "changes .data"),
    (Number, "converts a tensor to Python numbers"),
    (Noise, "draws random numbers"),
    (Seeded, "changes its attribute 'generator'"),
    (Wrapper, "changes its attribute 'base'"),
    (Learning, "has an attribute 'scale' that requires a gradient"),
]

torch.manual_seed(0)
X, Y, XV = torch.randn(6, 5).double(), torch.randn(6, 1).double(), torch.randn(6, 5).double()
STEPS = 4


def loss(net: Any, w: Any) -> Tensor:
    return (torch.sigmoid(w()) * (net(X) - Y).square().squeeze(1)).mean()


def upper_loss(net: Any) -> Tensor:
    return net(XV).square().mean()  # type: ignore[no-any-return]


def make(kind: Any) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(5, 1)
    return net, kind(net.parameters(), lr=0.1)


def plain(kind: Any, w: Tensor) -> float:
    net, optimizer = make(kind)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(net, lambda: w).backward()
        if isinstance(optimizer, LayerWise):
            with torch.no_grad():
                optimizer.step()
        else:
            optimizer.step()
    return upper_loss(net).item()


def program(kind: Any, response: nestor.Response) -> tuple[nestor.Program, nestor.Variable]:
    (net, optimizer), w = make(kind), nestor.Variable(torch.zeros(6))
    return nestor.Program(
        net=nestor.Problem(net, loss, optimizer=optimizer, unroll_steps=STEPS, response=response),
        w=nestor.Problem(w, upper_loss, optimizer=SGD(w.parameters(), lr=1.0)),
    ), w


@pytest.mark.parametrize("kind", [k for k in RIGHT if k is not LayerWise])
@pytest.mark.parametrize(
    "response",
    [*(nestor.Unrolled(checkpoint=c) for c in ("step", "tree", "none")), nestor.ForwardUnrolled()],
    ids=lambda response: response.describe(),
)
def test_hypergradient(kind: Any, response: nestor.Response) -> None:
    """Of steps that were taken, and of planned ones."""
    shifts = 1e-5 * torch.eye(6)
    expected = torch.tensor([(plain(kind, d) - plain(kind, -d)) / 2e-5 for d in shifts])
    built, w = program(kind, response)
    planned = built.hypergradient("w", {})["value"]
    torch.testing.assert_close(planned, expected, rtol=1e-6, atol=1e-9)
    nestor.Engine(built, seed=0).run(STEPS)
    torch.testing.assert_close(-w.value.detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", RIGHT)
def test_functional_steps_are_the_real_ones(kind: Any) -> None:
    """Four times, from the state that the last step returned; the optimizer does not change."""
    net, optimizer = make(kind)
    real, real_optimizer = make(kind)
    params, state = [p.detach().clone() for p in net.parameters()], None
    for _ in range(STEPS):
        params = [p.detach().requires_grad_() for p in params]
        grads = torch.autograd.grad(loss(lambda x, p=params: F.linear(x, *p), lambda: torch.zeros(6)), params)
        params, state = functional_step(optimizer, params, grads, state)
        real_optimizer.zero_grad()
        loss(real, lambda: torch.zeros(6)).backward()
        with torch.no_grad():
            real_optimizer.step()
    for got, expected in zip(params, real.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    assert not optimizer.state
    assert vars(optimizer).get("count", 0) == 0
    assert "k" not in optimizer.param_groups[0]


@pytest.mark.parametrize(("kind", "message"), REFUSED)
@pytest.mark.parametrize("response", [nestor.Unrolled(), nestor.ForwardUnrolled(), nestor.SAMA()])
def test_refused_when_the_program_is_built(kind: Any, message: str, response: nestor.Response) -> None:
    """What no state contains, or has no derivative; and other responses run."""
    with pytest.raises(nestor.UnsupportedError, match=rf"Level 'net'.*{kind.__name__}.*{message}.*update="):
        program(kind, response)
    built, _ = program(kind, nestor.T1T2())
    nestor.Engine(built, seed=0).run(1)


def test_step_replaced_on_the_instance() -> None:
    """Only the step of the class is differentiated; a scheduler's wrapper is no replacement."""
    net, w = nn.Linear(5, 1), nestor.Variable(torch.zeros(6))
    optimizer = SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def build() -> nestor.Program:
        return nestor.Program(
            net=nestor.Problem(net, loss, optimizer=optimizer, response=nestor.Unrolled()),
            w=nestor.Problem(w, upper_loss, optimizer=SGD(w.parameters(), lr=1.0)),
        )

    build()
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    with pytest.raises(nestor.UnsupportedError, match="replaced on the instance"):
        build()


def test_evolution_strategies_need_no_derivative() -> None:
    """They take the real steps: a step under no_grad is one."""
    built, _ = program(Lion, nestor.EvolutionStrategies(samples=2))
    assert all(torch.isfinite(v).all() for v in built.hypergradient("w", {}).values())


@pytest.mark.parametrize("kind", [Counter, Warm])
def test_counters_are_part_of_a_look_ahead_and_of_a_checkpoint(kind: Any) -> None:
    """A rollback undoes them; a resumed run continues with them."""
    built, _ = program(kind, nestor.Unrolled())
    nestor.Engine(built, seed=0, rollback=True).run(STEPS)
    assert built.levels["net"].problem.optimizer.count == 1  # type: ignore[union-attr]
    first, w = program(kind, nestor.Unrolled())
    engine = nestor.Engine(first, seed=0)
    engine.run(STEPS)
    second, other = program(kind, nestor.Unrolled())
    resumed = nestor.Engine(second, seed=0)
    resumed.load_state_dict(copy.deepcopy(engine.state_dict()))
    engine.run(STEPS)
    resumed.run(STEPS)
    assert torch.equal(w.value, other.value)


@pytest.mark.parametrize(
    ("kind", "expected"), [(Scaled, True), (Lion, True), (Warm, True), (LayerWise, False), (Number, False)]
)
def test_steps_of_stretches(kind: Any, expected: bool) -> None:
    """A process that holds a part of every parameter can step it alone, or not; nothing changes."""
    net, optimizer = make(kind)
    before = [p.detach().clone() for p in net.parameters()]
    assert is_elementwise(optimizer) is expected
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
    assert not optimizer.state


def test_compiled_engine_steps_it_eagerly() -> None:
    """A graph would keep the attributes as they were when it was traced."""
    shifts = 1e-5 * torch.eye(6)
    expected = torch.tensor([(plain(Counter, d) - plain(Counter, -d)) / 2e-5 for d in shifts])
    built, w = program(Counter, nestor.Unrolled())
    with pytest.warns(nestor.errors.NestorWarning, match="Counter is not one of torch.optim"):
        nestor.Engine(built, seed=0, compile=True).run(STEPS)
    torch.testing.assert_close(-w.value.detach(), expected, rtol=1e-6, atol=1e-9)
