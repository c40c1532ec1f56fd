"""The results of levels with tasks: copies as modules, validation of them, adaptation to an unseen task."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

TASKS = 3


class Net(nn.Module):
    """Tied weights, a frozen part, BatchNorm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm, self.drop, self.last = nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1)
        self.last.bias.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.second(self.norm(self.first(x))))))


def batch_of(seed: int, *leading: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*leading, 6, n, dtype=torch.float64, generator=generator) for n in (4, 1))
    return x, y


def fit(batch: Any, fast: Any) -> Tensor:
    return F.mse_loss(fast(batch[0]), batch[1])


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
}


def program_of(make: Make, *, dropout: float = 0.0, tasks: int | None = TASKS, **options: Any) -> nestor.Program:
    meta = Net(dropout)
    fast = copy.deepcopy(meta)
    shape = () if tasks is None else (tasks,)
    return nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            data=[batch_of(1, *shape)],
            optimizer=make(p for p in fast.parameters() if p.requires_grad),
            unroll_steps=3,
            init="meta",
            tasks=tasks,
            response=nestor.Unrolled(),
            **options,
        ),
        meta=nestor.Problem(
            meta, fit_meta, data=[batch_of(2, *shape)], optimizer=torch.optim.SGD(meta.parameters(), lr=0.1)
        ),
    )


def fit_meta(batch: Any, fast: Any) -> Tensor:
    return F.mse_loss(fast(batch[0]), batch[1])


def test_copies_are_the_tasks() -> None:
    """They compute what functional_call computes at a slice, and follow the run that trains them."""
    program = program_of(OPTIMIZERS["sgd"])
    copies = program.copies("fast")
    level = program.levels["fast"]
    x = batch_of(3)[0]
    for _ in range(2):
        nestor.Engine(program, seed=0).run(2)
        for task, found in enumerate(copies):
            assert isinstance(found, Net)
            assert found.second.weight is found.first.weight
            slices = {name: stack[task].detach() for name, stack in zip(level.names, level.parameters, strict=True)}
            assert all(torch.equal(dict(found.named_parameters())[name], value) for name, value in slices.items())
            expected = torch.func.functional_call(copy.deepcopy(level.problem.module), slices, (x,))
            assert torch.equal(found(x), expected)
    assert not torch.equal(copies[0].last.weight, copies[1].last.weight)


def test_copies_map_over_tasks() -> None:
    """Called together on stacked tensors, in any structure."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, batch: Any, factor: float) -> Any:
            return {"out": factor * self.layer(batch["x"]), "name": "two"}

    net, top = Two().double(), nestor.Variable(torch.zeros(()).double())
    program = nestor.Program(
        net=nestor.Problem(net, lambda net, top: (net.layer.weight - top()).square().sum(), tasks=TASKS),
        top=nestor.Problem(top, lambda net: net.layer.weight.sum()),
    )
    with torch.no_grad():
        program.levels["net"].parameters[0].mul_(torch.arange(1, TASKS + 1)[:, None, None])
    copies, x = program.copies("net"), batch_of(3, TASKS)[0]
    found = copies({"x": x}, 2.0)
    assert found["name"] == "two"
    assert found["out"].shape == (TASKS, 6, 2)
    for task, module in enumerate(copies):
        assert torch.equal(found["out"][task], module({"x": x[task]}, 2.0)["out"])
    assert not torch.equal(found["out"][0], copies[1]({"x": x[0]}, 2.0)["out"])
    with pytest.raises(ValueError, match=r"3 tasks were called with a tensor of shape \(2, 6, 4\)"):
        copies({"x": x[:2]}, 1.0)


def test_a_copy_trains_nothing() -> None:
    """It has no gradient, and its statistics are its own."""
    program = program_of(OPTIMIZERS["sgd"])
    module, (found, *_) = program.levels["fast"].problem.module, program.copies("fast")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    value = found(batch_of(3)[0])
    assert not value.requires_grad
    assert not torch.equal(found.norm.running_mean, module.norm.running_mean)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_weight_that_a_hook_computes() -> None:
    """The old weight_norm keeps a tensor with a graph, which deepcopy refuses."""
    with pytest.warns(FutureWarning):
        net = torch.nn.utils.weight_norm(nn.Linear(2, 1, bias=False))
    top = nestor.Variable(torch.zeros(()))
    program = nestor.Program(
        net=nestor.Problem(net, lambda batch, net, top: (net(batch) - top()).square().sum(), tasks=2),
        top=nestor.Problem(top, lambda batch, net: net(batch).sum()),
    )
    with torch.no_grad():
        program.levels["net"].parameters[0][1].mul_(2)
    one, two = (found(torch.ones(2)) for found in program.copies("net"))
    torch.testing.assert_close(two, 2 * one)


def test_levels_without_tasks_have_no_copies() -> None:
    with pytest.raises(ValueError, match=r"'meta' has no tasks.*tasks=n"):
        program_of(OPTIMIZERS["sgd"]).copies("meta")
    with pytest.raises(ValueError, match="no level 'slow'"):
        program_of(OPTIMIZERS["sgd"]).copies("slow")


def test_validation_gets_the_copies() -> None:
    """Three regressions at once, pulled to a common centre: the validation reads three solutions, in eval mode."""
    x, y = torch.ones(3, 1, 1).double(), torch.tensor([1.0, 2.0, 3.0]).double().view(3, 1, 1)
    net, centre = nn.Linear(1, 1, bias=False).double(), nestor.Variable(torch.zeros(1, 1).double())

    def low(batch: Any, net: Any, centre: Any) -> Tensor:
        return (net(batch[0]) - batch[1]).square().mean() + 1e-3 * (net.weight - centre()).square().sum()

    seen: list[Any] = []

    def validate(net: Any, centre: Any) -> dict[str, Any]:
        assert isinstance(centre, nestor.Variable)
        assert not any(module.training for module in (*net, centre))
        seen.append([module.weight.item() for module in net])
        return {"error": (net(x) - y).abs().sum(), "same": sum((m(x[k]) - y[k]).abs().sum() for k, m in enumerate(net))}

    program = nestor.Program(
        net=nestor.Problem(
            net, low, data=[(x, y)], optimizer=torch.optim.SGD(net.parameters(), 0.3), unroll_steps=10, tasks=3
        ),
        centre=nestor.Problem(
            centre,
            lambda batch, net: (net(batch[0]) - batch[1]).square().mean(),
            data=[(x, y)],
            optimizer=torch.optim.SGD(centre.parameters(), 0.1),
        ),
    )
    metrics = nestor.Engine(program, validate=validate, validate_every=50, seed=0).run(100)
    assert len(seen) == 2
    torch.testing.assert_close(seen[-1], [1.0, 2.0, 3.0], rtol=5e-3, atol=0)
    assert metrics["validation/error"] < 1e-2
    assert metrics["validation/error"] == pytest.approx(metrics["validation/same"], rel=1e-12)
    assert net.training


def by_hand(start: nn.Module, make: Make, batch: Any, steps: int) -> nn.Module:
    net = copy.deepcopy(start)
    optimizer = make([p for p in net.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        fit(batch, net).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tasks", [None, TASKS])
@pytest.mark.parametrize("steps", [None, 0, 1, 5])
def test_adaptation_by_hand(name: str, tasks: int | None, steps: int | None) -> None:
    """From the trained start, with an empty optimizer, in plain torch; nothing of the program moves."""
    program = program_of(OPTIMIZERS[name], tasks=tasks)
    engine = nestor.Engine(program, seed=0)
    engine.run(7)
    batch = batch_of(5)
    expected = by_hand(program.levels["meta"].problem.module, OPTIMIZERS[name], batch, 3 if steps is None else steps)
    before, state = copy.deepcopy(engine.state_dict()), torch.get_rng_state()
    found = program.adapt("fast", batch, steps)
    after = engine.state_dict()
    for found_state in (before, after):
        assert isinstance(found_state.pop("program"), dict)  # texts
        assert isinstance(found_state.pop("run"), str)
        for level in found_state["states"].values():
            level["constants"] = level["watch"] = None  # count the evaluations of the loss
            level["solves"] = {name: {**solve, "notice": None} for name, solve in level["solves"].items()}  # a text
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(found) is Net
    assert found.second.weight is found.first.weight
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in expected.parameters()]
    own = {p.data_ptr() for level in program.levels.values() for p in level.problem.module.parameters()}
    assert not own & {p.data_ptr() for p in found.parameters()}


def test_statistics_of_an_adapted_copy_move() -> None:
    """As in plain torch; those of the program do not."""
    program = program_of(OPTIMIZERS["sgd"])
    expected = by_hand(program.levels["fast"].problem.module, OPTIMIZERS["sgd"], batch_of(5), 3)
    found = program.adapt("fast", batch_of(5))
    torch.testing.assert_close(found.norm.running_var, expected.norm.running_var, rtol=1e-12, atol=0)
    assert found.norm.num_batches_tracked == 3
    assert program.levels["fast"].problem.module.norm.num_batches_tracked == 0


def test_random_numbers_of_an_adaptation() -> None:
    """They follow from the generators' state, which does not move; two steps draw different masks."""
    program = program_of(OPTIMIZERS["sgd"], dropout=0.5)
    ends = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ends.append(program.adapt("fast", batch_of(5)).last.weight)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("rule", ["update", "optimizer"])
def test_learned_learning_rates(rule: str) -> None:
    """Meta-SGD: the adaptation uses the rates that the run has learned."""
    rate = nestor.Variable(torch.tensor(0.1).double())
    meta = nn.Linear(4, 1).double()
    fast = copy.deepcopy(meta)

    def update(params: Any, grads: Any, state: Any, rate: Any) -> Any:
        return [p - rate() * g for p, g in zip(params, grads, strict=True)], state

    above = [batch_of(2, TASKS)]
    own: dict[str, Any] = {"update": update}
    if rule == "optimizer":
        own = {"optimizer": torch.optim.SGD(fast.parameters(), lr=rate.value)}
    program = nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            data=[batch_of(1, TASKS)],
            init="meta",
            tasks=TASKS,
            unroll_steps=2,
            response=nestor.Unrolled(),
            clip_norm=0.5,
            **own,
        ),
        rate=nestor.Problem(rate, fit_meta, data=above, optimizer=torch.optim.SGD(rate.parameters(), 0.1)),
        meta=nestor.Problem(meta, fit_meta, data=above, optimizer=torch.optim.SGD(meta.parameters(), 0.1)),
    )
    nestor.Engine(program, seed=0).run(6)
    assert abs(rate.value.item() - 0.1) > 1e-3
    params = [p.detach().clone().requires_grad_() for p in meta.parameters()]
    x, y = batch_of(5)
    for _ in range(2):
        grads = torch.autograd.grad(F.mse_loss(F.linear(x, *params), y), params)
        factor = min(1.0, 0.5 / (torch.cat([g.flatten() for g in grads]).norm().item() + 1e-6))
        params = [(p - rate.value * factor * g).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
    found = program.adapt("fast", (x, y))
    for one, other in zip(found.parameters(), params, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-14)


def test_adaptation_near_the_start_without_init() -> None:
    """A level that reads the one above and starts from its own module: its present variables, or the tasks' start."""
    for tasks in (None, TASKS):
        net, centre = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()
        first = copy.deepcopy(net)

        def near(batch: Any, net: Any, centre: Any) -> Tensor:
            return F.mse_loss(net(batch[0]), batch[1]) + (net.weight - centre.weight).square().sum()

        shape = () if tasks is None else (tasks,)
        program = nestor.Program(
            net=nestor.Problem(
                net, near, data=[batch_of(1, *shape)], optimizer=torch.optim.SGD(net.parameters(), 0.1), tasks=tasks
            ),
            centre=nestor.Problem(
                centre,
                lambda batch, net: fit(batch, net),
                data=[batch_of(2, *shape)],
                optimizer=torch.optim.SGD(centre.parameters(), 0.1),
            ),
        )
        nestor.Engine(program, seed=0).run(3)
        found = program.adapt("net", batch_of(5), 1)
        start = first if tasks else net
        loss = near(batch_of(5), start, centre)
        grads = torch.autograd.grad(loss, [start.weight, start.bias])
        for one, other, g in zip(found.parameters(), (start.weight, start.bias), grads, strict=True):
            torch.testing.assert_close(one.detach(), other.detach() - 0.1 * g, rtol=1e-12, atol=1e-14)


def test_what_cannot_be_adapted() -> None:
    """A level with lowers, one without a rule, a bad number of steps, a loss that overflows."""
    program = program_of(OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match=r"'meta' cannot be adapted.*best responses of 'fast'"):
        program.adapt("meta", batch_of(5))
    for steps in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"adapt\(steps="):
            program.adapt("fast", batch_of(5), steps)  # type: ignore[arg-type]
    with pytest.raises(nestor.NonFiniteError, match="Step 1 of the adaptation"):
        program.adapt("fast", (batch_of(5)[0], batch_of(5)[1] * float("nan")))
    net, top = nestor.Variable(torch.zeros(2)), nestor.Variable(torch.zeros(2))
    bare = nestor.Program(
        net=nestor.Problem(net, lambda net, top: (net() - top()).square().sum()),
        top=nestor.Problem(top, lambda net: net().sum()),
    )
    with pytest.raises(ValueError, match="no optimizer and no update"):
        bare.adapt("net", None)
