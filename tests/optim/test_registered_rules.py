"""Rules that are registered for optimizers whose steps have no derivative: compared with re-run plain torch."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import nestor
from nestor.optim import functional_step, register_rule
from nestor.optim.functional_step import check_step

STEPS = 4
Slot = Mapping[str, Any]


pytestmark = pytest.mark.usefixtures("double")


class Softened(Optimizer):
    """Momentum, a warm-up that counts in a hyperparameter, decay; all of it under no_grad and in place."""

    def __init__(self, params: Any, lr: Any = 0.3, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.8, "decay": decay, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            size = group["lr"] * min(1.0, (group["k"] + 1) / 3)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"], state["calls"] = torch.zeros_like(p), 0
                state["average"].mul_(group["beta"]).add_(p.grad)
                state["calls"] += 1
                p.mul_(1 - size * group["decay"]).sub_(size * state["average"].tanh())
            group["k"] += 1


def softened(parameter: Tensor, gradient: Tensor, slot: Slot, group: Slot) -> tuple[Tensor, dict[str, Any]]:
    size = group["lr"] * min(1.0, (group["k"] + 1) / 3)
    average = slot["average"] * group["beta"] + gradient if slot else gradient
    return parameter * (1 - size * group["decay"]) - size * average.tanh(), {"average": average}


register_rule(Softened, softened)

x, y = (
    torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    torch.linspace(-1, 1, 6).double(),
)


def loss(net: Any, w: Any) -> Tensor:
    return ((1 + w()) * (net(x).squeeze(1) - y).square()).mean()


def upper_loss(net: Any) -> Tensor:
    return (net(x).squeeze(1) - y.cos()).square().mean()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 1)


def rerun(shift: Tensor, lr: float = 0.3) -> float:
    """The upper loss after plain steps of torch."""
    net = linear()
    optimizer = Softened(net.parameters(), lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(net, lambda: shift).backward()
        optimizer.step()
    return upper_loss(net).item()


def slopes(of: Callable[[Tensor], float], size: int) -> Tensor:
    return torch.tensor([(of(d) - of(-d)) / 2e-5 for d in 1e-5 * torch.eye(size)])


def program(response: nestor.Response, optimizer: Any = Softened) -> tuple[nestor.Program, nestor.Variable]:
    net, w = linear(), nestor.Variable(torch.zeros(6))
    return nestor.Program(
        net=nestor.Problem(net, loss, optimizer=optimizer(net.parameters()), unroll_steps=STEPS, response=response),
        w=nestor.Problem(w, upper_loss, optimizer=SGD(w.parameters(), lr=1.0)),
    ), w


@pytest.mark.parametrize(
    "response",
    [*(nestor.Unrolled(checkpoint=c) for c in ("step", "tree", "none")), nestor.ForwardUnrolled()],
    ids=lambda response: response.describe(),
)
def test_unrolled_steps(response: nestor.Response) -> None:
    """Of steps that were taken, counters and all, and of planned ones."""
    expected = slopes(rerun, 6)
    built, w = program(response)
    planned = built.hypergradient("w", {})["value"]
    torch.testing.assert_close(planned, expected, rtol=1e-6, atol=1e-9)
    nestor.Engine(built, seed=0).run(STEPS)
    torch.testing.assert_close(-w.value.detach(), expected, rtol=1e-6, atol=1e-9)


def test_sama_multiplies_the_derivative_of_the_last_step() -> None:
    """D = -dStep/dg at the state of the last step: here size * (1 - tanh^2)."""
    built, _ = program(nestor.SAMA(cross=nestor.ForwardMode()))
    engine = nestor.Engine(built, seed=0)
    engine.run(STEPS - 1)
    hyper = built.hypergradient("w", {})["value"]
    (net,) = [built.levels["net"].problem.module]
    params = [p.detach().clone().requires_grad_() for p in net.parameters()]
    w = torch.zeros(6, requires_grad=True)
    forward = lambda p: F.linear(x, *p)  # noqa: E731
    optimizer: Any = built.levels["net"].problem.optimizer
    value = (forward(params).squeeze(1) - y.cos()).square().mean()
    above = torch.autograd.grad(value, params)
    gradient = torch.autograd.grad(loss(lambda _: forward(params), lambda: w), params, create_graph=True)
    group = optimizer.param_groups[0]
    size = group["lr"] * min(1.0, (group["k"] + 1) / 3)
    pulled = []
    for p, g, c in zip(net.parameters(), gradient, above, strict=True):
        average = optimizer.state[p]["average"] * group["beta"] + g.detach()
        pulled.append(size * (1 - average.tanh().square()) * c)
    (expected,) = torch.autograd.grad(gradient, w, pulled)
    torch.testing.assert_close(hyper, -expected, rtol=1e-9, atol=1e-12)


def test_learned_hyperparameter() -> None:
    """The rule receives a tensor."""
    net, rate = linear(), nestor.Variable(torch.tensor(0.3))
    built = nestor.Program(
        net=nestor.Problem(
            net,
            lambda net: loss(net, lambda: torch.zeros(6)),
            optimizer=Softened(net.parameters(), lr=rate.value),
            unroll_steps=STEPS,
            response=nestor.Unrolled(),
        ),
        rate=nestor.Problem(rate, upper_loss, optimizer=SGD(rate.parameters(), lr=1.0)),
    )
    nestor.Engine(built, seed=0).run(STEPS)
    expected = (rerun(torch.zeros(6), 0.3 + 1e-5) - rerun(torch.zeros(6), 0.3 - 1e-5)) / 2e-5
    assert 0.3 - rate.value.item() == pytest.approx(expected, rel=1e-6)


def test_functional_steps_are_the_optimizers() -> None:
    """Numbers that the step changes travel in the state; the optimizer does not change."""
    net, real = linear(), linear()
    optimizer, real_optimizer = Softened(net.parameters()), Softened(real.parameters())
    params, state = [p.detach().clone() for p in net.parameters()], None
    for _ in range(STEPS):
        params = [p.detach().requires_grad_() for p in params]
        grads = torch.autograd.grad(loss(lambda x, p=params: F.linear(x, *p), lambda: torch.zeros(6)), params)
        params, state = functional_step(optimizer, params, grads, state)
        real_optimizer.zero_grad()
        loss(real, lambda: torch.zeros(6)).backward()
        real_optimizer.step()
    for got, expected in zip(params, real.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    assert state is not None
    assert state[0]["calls"] == STEPS
    assert not optimizer.state
    assert optimizer.param_groups[0]["k"] == 0


def test_tasks_and_a_meta_learned_start() -> None:
    """The memory of each task, counters included; compared with plain steps of each task."""
    xs, ys = torch.randn(3, 8, 5), torch.randn(3, 8)

    def fit(batch: Any, net: Any) -> Tensor:
        return (net(batch[0]).squeeze(-1) - batch[1]).square().mean()

    start, net = linear(), linear()
    meta = nestor.Program(
        net=nestor.Problem(
            net, fit, optimizer=Softened(net.parameters()), data=[(xs, ys)], unroll_steps=2, init="start", tasks=3,
            response=nestor.Unrolled(),
        ),
        start=nestor.Problem(
            start, fit, data=[(xs, ys)], optimizer=SGD(start.parameters(), lr=1.0), reads={"net": "net"}
        ),
    )  # fmt: skip
    before = [p.detach().clone() for p in start.parameters()]
    nestor.Engine(meta, seed=0).run(2)
    found = [b - p.detach() for b, p in zip(before, start.parameters(), strict=True)]

    def objective(flat: Tensor) -> float:
        total = 0.0
        for task in range(3):
            own = linear()
            torch.nn.utils.vector_to_parameters(flat.clone(), own.parameters())
            optimizer = Softened(own.parameters())
            for _ in range(2):
                optimizer.zero_grad()
                fit((xs[task], ys[task]), own).backward()
                optimizer.step()
            total += fit((xs[task], ys[task]), own).item() / 3
        return total

    point = torch.cat([b.flatten() for b in before])
    expected = slopes(lambda d: objective(point + d), len(point))
    torch.testing.assert_close(torch.cat([f.flatten() for f in found]), expected, rtol=1e-6, atol=1e-9)


def test_compiled_engine_steps_it_eagerly() -> None:
    built, w = program(nestor.Unrolled())
    with pytest.warns(nestor.errors.NestorWarning, match="Softened is not one of torch.optim"):
        nestor.Engine(built, seed=0, compile=True).run(STEPS)
    torch.testing.assert_close(-w.value.detach(), slopes(rerun, 6), rtol=1e-6, atol=1e-9)


def altered(change: Callable[..., Any]) -> Any:
    """A class of its own with a rule that is changed."""

    class Other(Softened):
        pass

    register_rule(Other, change)
    return Other


WRONG: list[tuple[Callable[..., Any], str]] = [
    (lambda p, g, s, h: (p - h["lr"] * g, {"average": g}), "the variables other values than the step"),
    (lambda p, g, s, h: (softened(p, g, s, h)[0], {}), "returns no tensor 'average'"),
    (lambda p, g, s, h: (softened(p, g, s, h)[0], {"average": g}), "'average' of the state other values"),
    (lambda p, g, s, h: (softened(p, g.detach(), s, h)[0], softened(p, g, s, h)[1]), "slope"),
    (torch.no_grad()(softened), "without a graph"),
    (lambda p, g, s, h: (softened(p, g, s, h)[0].sum(), {"average": g}), "shape"),
]


@pytest.mark.parametrize(("rule", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_rule_is_refused_when_the_program_is_built(rule: Callable[..., Any], message: str) -> None:
    kind = altered(rule)
    with pytest.raises(nestor.UnsupportedError, match=f"(?s)registered for Other .*{message}"):
        program(nestor.Unrolled(), kind)
    built, _ = program(nestor.T1T2(), kind)  # takes no derivative of a step
    nestor.Engine(built, seed=0).run(1)


def test_a_wrong_derivative_is_found_at_any_rate() -> None:
    """Its part of the step is small beside the variables."""

    def detached(parameter: Tensor, gradient: Tensor, slot: Slot, group: Slot) -> tuple[Tensor, dict[str, Any]]:
        return softened(parameter, gradient.detach(), slot, group)

    kind = altered(detached)
    for lr in (0.3, 1e-3, 1e-6):
        with pytest.raises(nestor.UnsupportedError, match=r"slope .* in the gradient of a step"):
            program(nestor.Unrolled(), lambda params, lr=lr: kind(params, lr))
        program(nestor.Unrolled(), lambda params, lr=lr: Softened(params, lr))


class ChangesGradients(Optimizer):
    """A weight decay that is added to the gradients in place, as in schedule-free SGD."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.3, "decay": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(p, alpha=group["decay"])
                p.sub_(group["lr"] * p.grad.tanh())


register_rule(ChangesGradients, lambda p, g, s, h: (p - h["lr"] * (g + h["decay"] * p).tanh(), {}))


@pytest.mark.parametrize("response", [nestor.SAMA(cross=nestor.ForwardMode()), nestor.Unrolled()])
def test_gradients_that_a_step_changes_in_place(response: nestor.Response) -> None:
    """The history holds them as they were: one step of two variables, against its formula."""
    start, given = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.4])
    low, top = nestor.Variable(start.clone()), nestor.Variable(given.clone())
    built = nestor.Program(
        low=nestor.Problem(
            low,
            lambda low, top: ((low() - top()) ** 2).sum(),
            optimizer=ChangesGradients(low.parameters()),
            response=response,
        ),
        top=nestor.Problem(top, lambda low: (low() ** 3).sum(), optimizer=SGD(top.parameters(), lr=1.0)),
    )
    nestor.Engine(built, seed=0).run(1)
    bent = (2 * (start - given) + 0.5 * start).tanh()
    expected = 2 * 0.3 * (1 - bent**2) * 3 * (start - 0.3 * bent) ** 2
    torch.testing.assert_close(given - top.value.detach(), expected, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in low.parameters())


def test_a_rule_that_is_wrong_later_is_refused_at_that_step() -> None:
    """Its first steps agree, those after the warm-up do not."""

    def rule(parameter: Tensor, gradient: Tensor, slot: Slot, group: Slot) -> tuple[Tensor, dict[str, Any]]:
        return softened(parameter, gradient, slot, {**group, "lr": group["lr"] * (2 if group["k"] == 3 else 1)})

    built, w = program(nestor.Unrolled(), altered(rule))
    with pytest.raises(Exception, match="registered for Other gives the variables other values"):
        nestor.Engine(built, seed=0).run(STEPS)
    assert not w.value.any()


class Estimating(Optimizer):
    """A rate that depends on the gradients, as a number among the hyperparameters (Prodigy, D-Adaptation)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"d": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.1 * group["d"] * p.grad)
                group["d"] = float(p.grad.norm())


def test_numbers_that_depend_on_the_gradient_are_refused() -> None:
    register_rule(Estimating, lambda p, g, s, h: (p - 0.1 * h["d"] * g, {}))
    with pytest.raises(nestor.UnsupportedError, match=r"Estimating changes numbers .* depend on the gradient"):
        program(nestor.Unrolled(), Estimating)


def test_a_step_that_fails_on_copies_is_refused() -> None:
    """As that of schedule-free optimizers before their ``train()``."""

    class Unready(Softened):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("not in train mode")

    register_rule(Unready, softened)
    with pytest.raises(nestor.UnsupportedError, match=r"a step of Unready .* fails .*not in train mode"):
        program(nestor.Unrolled(), Unready)


class Sparse(torch.optim.Adafactor):
    """Stands for a class of torch.optim without the option ``differentiable``."""

    __module__ = "torch.optim.adafactor"


def adafactor(parameter: Tensor, gradient: Tensor, slot: Slot, group: Slot) -> tuple[Tensor, dict[str, Any]]:
    """Of a vector, whose second moment is not factored."""
    step = slot["step"] + 1 if slot else torch.tensor(1.0, dtype=torch.float32)
    count = step.item()
    beta = count ** group["beta2_decay"]
    rho = min(group["lr"], 1 / count**0.5)
    alpha = max(group["eps"][1] or 0, (parameter.norm(2) / parameter.numel() ** 0.5).item()) * rho
    variance = slot["variance"] if slot else torch.zeros_like(gradient)
    variance = variance + beta * (gradient.square() - variance)
    update = gradient * variance.clamp(min=torch.finfo(gradient.dtype).eps ** 2).rsqrt()
    update = update / max(1.0, (update.norm(2) / (update.numel() ** 0.5 * group["d"])).item())
    decayed = parameter * (1 - group["lr"] * group["weight_decay"])
    return decayed - alpha * update, {"step": step, "variance": variance}


def test_optimizers_of_torch_without_a_differentiable_step() -> None:
    """The values are those of the optimizer; a rule that treats norms as constants has no right derivative."""
    weight = torch.randn(4, requires_grad=True)
    optimizer = Sparse([weight], lr=0.1)
    with pytest.raises(TypeError, match="no differentiable step"):
        functional_step(optimizer, [weight], [weight], None)
    register_rule(Sparse, adafactor)
    (new,), _ = functional_step(optimizer, [weight], [2 * weight], None)
    weight.grad = 2 * weight.detach()
    optimizer.step()
    torch.testing.assert_close(new.detach(), weight.detach())
    with pytest.raises(TypeError, match="slope"):
        check_step(optimizer, derivative=True)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((SGD, softened), ValueError, "has the rule of this class already"),
        ((Adam, softened), ValueError, "kind=Adam"),
        ((nn.Linear, softened), TypeError, "class of optimizers"),
        ((Softened, None), TypeError, "rule=None"),
    ],
)
def test_declarations(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        register_rule(*arguments)


def test_the_registration_is_of_the_class_alone() -> None:
    class Sub(Softened):
        pass

    with pytest.raises(nestor.UnsupportedError, match=r"Sub computes under no_grad.*register_rule"):
        program(nestor.Unrolled(), Sub)
