"""Tasks one after the other: what torch.vmap cannot map, or maps wrongly, equals separate runs in plain torch."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import nestor

TASKS, STEPS, RATE = 3, 3, 0.3


class Recurrent(nn.Module):
    """A layer without a rule for vmap."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Spectral(nn.Module):
    """Its power iteration changes buffers in place; the buffers of a level with tasks stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x[:, 0])))


class Padded(nn.Module):
    """Torch masks the gradient of one row of a table, which inside vmap is the table of all tasks."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.table, self.head, self.raw = nn.Embedding(7, 3, padding_idx=-7), nn.Linear(3, 1), raw

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :, 0] > 0.3).long() * (x[:, :, 1] > 0).long().add(2)
        found = torch.embedding(self.table.weight, words, 0) if self.raw else self.table(words)
        return self.head(torch.tanh(found.mean(1)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "spectral_norm": Spectral,
    "padding_idx": lambda: Padded(False),
    "torch.embedding": lambda: Padded(True),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(TASKS, 6, *n, dtype=torch.float64, generator=generator) for n in ((5, 3), (1,)))  # type: ignore[return-value]


SUPPORT, QUERY = batch_of(1), batch_of(2)


def adapt(batch: Any, fast: Any, meta: Any) -> dict[str, Any]:
    """Fit a task near the start; a metric is read to a number."""
    near = sum((p - q).square().sum() for p, q in zip(fast.parameters(), meta.parameters(), strict=True))
    loss = F.mse_loss(fast(batch[0]), batch[1])
    return {"loss": loss + 0.5 * near, "fit": loss.item()}


def query(batch: Any, fast: Any) -> Tensor:
    return F.mse_loss(fast(batch[0]), batch[1])


def program_of(name: str, response: nestor.Response, **options: Any) -> nestor.Program:
    meta = make(name)
    fast = copy.deepcopy(meta)
    return nestor.Program(
        fast=nestor.Problem(
            fast,
            adapt,
            data=[SUPPORT],
            optimizer=torch.optim.SGD(fast.parameters(), lr=RATE),
            unroll_steps=STEPS,
            init="meta",
            tasks=TASKS,
            response=response,
            **options,
        ),
        meta=nestor.Problem(meta, query, data=[QUERY], optimizer=torch.optim.SGD(meta.parameters(), lr=1.0)),
    )


class Alone:
    """One task of the program above in plain torch: its adaptation, and the formula of each response."""

    def __init__(self, name: str, task: int) -> None:
        self.net, self.task = make(name), task
        self.start = [p.detach().clone().requires_grad_() for p in self.net.parameters()]
        self.names = [n for n, _ in self.net.named_parameters()]
        self.theta = self.adapted()
        self.end = [t.detach().requires_grad_() for t in self.theta]
        self.cotangent = torch.autograd.grad(self.upper(self.end), self.end)

    def evaluate(self, params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        buffers = {n: b.clone() for n, b in self.net.named_buffers()}
        found = functional_call(
            self.net, {**dict(zip(self.names, params, strict=True)), **buffers}, batch[0][self.task]
        )
        return F.mse_loss(found, batch[1][self.task])

    def lower(self, params: Any) -> Tensor:
        near = sum((p - q).square().sum() for p, q in zip(params, self.start, strict=True))
        return self.evaluate(params, SUPPORT) + 0.5 * near

    def upper(self, params: Any) -> Tensor:
        return self.evaluate(params, QUERY)

    def adapted(self) -> list[Tensor]:
        params = self.start
        for _ in range(STEPS):
            grads = torch.autograd.grad(self.lower(params), params, create_graph=True)
            params = [p - RATE * g for p, g in zip(params, grads, strict=True)]
        return params

    def mixed(self, vector: Any) -> Any:
        gradient = torch.autograd.grad(self.lower(self.end), self.end, create_graph=True)
        return torch.autograd.grad(gradient, self.start, vector)

    def unrolled(self) -> Any:
        return torch.autograd.grad(self.upper(self.theta), self.start)

    def t1t2(self) -> Any:
        return [-m for m in self.mixed(self.cotangent)]

    def sama(self) -> Any:
        return [-RATE * m for m in self.mixed(self.cotangent)]

    def first_order(self) -> Any:
        return self.cotangent

    def implicit(self) -> Any:
        gradient = torch.autograd.grad(self.lower(self.end), self.end, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradient])
        rows = [
            torch.cat([h.flatten() for h in torch.autograd.grad(entry, self.end, retain_graph=True)]) for entry in flat
        ]
        right = torch.cat([c.flatten() for c in self.cotangent])
        solved = torch.linalg.solve(torch.stack(rows), right).split([p.numel() for p in self.end])
        return [-m for m in self.mixed([s.view_as(p) for s, p in zip(solved, self.end, strict=True)])]


SOLVER = nestor.NormalConjugateGradient(max_steps=2000, rtol=1e-14)
RESPONSES: dict[str, tuple[Callable[[], nestor.Response], Callable[[Alone], Any], float]] = {
    "step": (nestor.Unrolled, Alone.unrolled, 1e-10),
    "sqrt": (lambda: nestor.Unrolled(checkpoint="sqrt"), Alone.unrolled, 1e-10),
    "none": (lambda: nestor.Unrolled(checkpoint="none"), Alone.unrolled, 1e-10),
    "t1t2": (nestor.T1T2, Alone.t1t2, 1e-10),
    "cg": (lambda: nestor.Implicit(solver=SOLVER), Alone.implicit, 1e-6),
    "sama": (
        nestor.SAMA,
        Alone.sama,
        1e-8,
    ),  # the mixed derivative is that of the proximal term, so differences are exact
    "difference": (nestor.FiniteDifference, Alone.t1t2, 1e-8),
    "first_order": (nestor.FirstOrder, Alone.first_order, 1e-10),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("response", RESPONSES)
def test_meta_gradient_equals_separate_runs(response: str, name: str) -> None:
    """The step that an engine takes, against each task alone in plain torch."""
    make_response, formula, tolerance = RESPONSES[response]
    program = program_of(name, make_response(), vectorize=False)
    before = [p.detach().clone() for p in program.levels["meta"].parameters]
    nestor.Engine(program, seed=0).run(STEPS)
    alone = [formula(Alone(name, task)) for task in range(TASKS)]
    size = max(sum(g).norm().item() for g in zip(*alone, strict=True)) / TASKS
    for start, parameter, grads in zip(
        before, program.levels["meta"].parameters, zip(*alone, strict=True), strict=True
    ):
        assert (start - parameter.detach() - sum(grads) / TASKS).norm() <= tolerance * size


@pytest.mark.parametrize("name", ["lstm", "spectral_norm"])
def test_chosen_by_itself_with_one_warning(name: str) -> None:
    """The loss of the level above cannot be mapped either, and says nothing more. The numbers are the same."""
    ends = []
    for options in ({"vectorize": False}, {}):
        program = program_of(name, nestor.Unrolled(), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metrics = nestor.Engine(program, seed=0).run(2 * STEPS)
        told = [str(w.message) for w in caught if issubclass(w.category, nestor.NestorWarning)]
        assert len(told) == (0 if options else 1)
        assert all("Level 'fast'" in text and "vectorize=False" in text and "adapt (" in text for text in told)
        assert metrics["fast/fit"] > 0
        ends.append([p.detach().clone() for p in program.levels["meta"].parameters])
    assert all(map(torch.equal, *ends))


def test_a_metric_of_the_level_above_that_is_read_to_a_number() -> None:
    """The lower loss was mapped, the upper one is not: one warning names both."""
    net, meta = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(1).double())

    def low(batch: Any, net: Any, meta: Any) -> Tensor:
        return F.mse_loss(net(batch[0][:, 0]), batch[1]) + (net.bias - meta()).square().sum()

    def top(batch: Any, net: Any) -> dict[str, Any]:
        loss = F.mse_loss(net(batch[0][:, 0]), batch[1])
        return {"loss": loss, "positive": float(loss.detach()) > 0}

    program = nestor.Program(
        net=nestor.Problem(net, low, data=[SUPPORT], optimizer=torch.optim.SGD(net.parameters(), 0.1), tasks=TASKS),
        meta=nestor.Problem(meta, top, data=[QUERY], optimizer=torch.optim.SGD(meta.parameters(), 0.1)),
    )
    with pytest.warns(nestor.NestorWarning, match=r"Level 'net': tasks are.*top \(.*level 'meta' cannot") as caught:
        metrics = nestor.Engine(program, seed=0).run(3)
    assert len(caught) == 1
    assert metrics["meta/positive"] == 1.0


def test_an_error_of_the_loss_is_its_own() -> None:
    """It fails for one task alone too, so it is raised as it is, without a warning."""
    program = program_of("padding_idx", nestor.T1T2())

    def wrong(batch: Any, fast: Any, meta: Any) -> Tensor:
        return fast(batch[0]).sum() + meta.missing

    level = program.levels["fast"].problem
    broken = nestor.Program(
        fast=nestor.Problem(level.module, wrong, tasks=TASKS, data=[SUPPORT], init="meta", optimizer=level.optimizer),
        meta=program.levels["meta"].problem,
    )
    with pytest.raises(AttributeError, match="missing") as caught:
        nestor.Engine(broken, seed=0).run(1)
    assert caught.value.__context__ is None  # nothing of the mapping before it
    with pytest.raises(ValueError, match="give tasks=n"):
        nestor.Problem(level.module, adapt, vectorize=False)
    with pytest.raises(TypeError, match="vectorize='no'"):
        nestor.Problem(level.module, adapt, tasks=2, vectorize="no")  # type: ignore[arg-type]


def test_a_loss_that_cannot_be_mapped_later_on() -> None:
    """It could at first, and its steps are replayed as they were taken: an error names the remedy."""
    net, top = nestor.Variable(torch.ones(2).double()), nestor.Variable(torch.zeros(2).double())
    calls: list[int] = []

    def low(net: Any, top: Any) -> Tensor:
        calls.append(1)
        value = (net() - top()).square().sum()
        return value * float(value.detach()) if len(calls) > 20 else value

    program = nestor.Program(
        net=nestor.Problem(net, low, optimizer=torch.optim.SGD(net.parameters(), 0.1), tasks=2),
        top=nestor.Problem(top, lambda net: net().square().sum(), optimizer=torch.optim.SGD(top.parameters(), 0.1)),
    )
    with pytest.raises(nestor.LossError, match=r"level 'net'.*vectorize=False"):
        nestor.Engine(program, seed=0).run(30)


class Wrong(torch.autograd.Function):
    """A function whose rule for vmap uses the factor of the first task for all."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, factor = ctx.saved_tensors
        return cotangent * factor, (cotangent * x).sum_to_size(factor.shape)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, factor: Tensor) -> Any:
        return Wrong.apply(x, factor.select(dims[1], 0) if dims[1] is not None else factor), dims[0]


def test_a_wrong_rule_for_vmap_is_noticed() -> None:
    """Mapped and alone are compared once: the kind of operator need not be known."""
    net, top = nestor.Variable(torch.tensor([1.0, 2.0]).double()), nestor.Variable(torch.zeros(2).double())

    def low(batch: Any, net: Any, top: Any) -> Tensor:
        return (Wrong.apply(net(), batch) - top()).square().sum()

    program = nestor.Program(
        net=nestor.Problem(
            net,
            low,
            data=[torch.tensor([[1.0], [3.0]]).double()],
            optimizer=torch.optim.SGD(net.parameters(), 0.05),
            tasks=2,
        ),
        top=nestor.Problem(top, lambda net: net().square().sum(), optimizer=torch.optim.SGD(top.parameters(), 0.1)),
    )
    with pytest.warns(nestor.NestorWarning, match="another value or another derivative"):
        nestor.Engine(program, seed=0).run(1)
    start = torch.tensor([1.0, 2.0]).double()
    expected = torch.stack([start - 0.05 * 2 * factor**2 * start for factor in (1.0, 3.0)])
    torch.testing.assert_close(program.levels["net"].parameters[0].detach(), expected)


class Net(nn.Module):
    """A block that is computed again in the backward pass if ``checkpointed``."""

    def __init__(self, checkpointed: bool, dropout: float) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.dropout(torch.tanh(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x))


CHECKPOINTED: dict[str, Callable[[], nestor.Response]] = {
    "t1t2": nestor.T1T2,
    "forward": lambda: nestor.T1T2(cross=nestor.ForwardMode()),
    "difference": nestor.FiniteDifference,
    "sama": nestor.SAMA,
    "cg": lambda: nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5, rtol=0.0), damping=40.0),
    "step": nestor.Unrolled,
    "sqrt": lambda: nestor.Unrolled(checkpoint="sqrt"),
    "none": lambda: nestor.Unrolled(checkpoint="none"),
    "forward_unrolled": nestor.ForwardUnrolled,
    "evolution": lambda: nestor.EvolutionStrategies(samples=2, sigma=0.1),
    "reuse": lambda: nestor.FiniteDifference(reuse=True),
}


def shifted(response: nestor.Response, *, checkpointed: bool, dropout: float, **options: Any) -> list[Tensor]:
    """Learn a shift of the inputs of three tasks for two upper steps; return all variables."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x, y, xv, yv = (torch.randn(TASKS, 8, n, dtype=torch.float64, generator=generator) for n in (5, 1, 5, 1))
    net, shift = Net(checkpointed, dropout).double(), nestor.Variable(torch.zeros(5, dtype=torch.float64))
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda batch, net, shift: (net(batch[0] + shift()) - batch[1]).square().mean(),
            data=[(x, y)],
            response=response,
            unroll_steps=3,
            optimizer=torch.optim.SGD(net.parameters(), 0.2, 0.5),
            tasks=TASKS,
            **options,
        ),
        shift=nestor.Problem(
            shift,
            lambda batch, net: F.mse_loss(net(batch[0]), batch[1]),
            data=[(xv, yv)],
            optimizer=torch.optim.SGD(shift.parameters(), lr=1.0),
        ),
    )
    nestor.Engine(program, seed=0).run(6)
    return [p.detach() for level in program.levels.values() for p in level.parameters]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_no_bit(name: str, dropout: float) -> None:
    """Each task's block is computed again with the tensors and the random numbers of that task."""
    plain, again = (
        shifted(CHECKPOINTED[name](), checkpointed=checkpointed, dropout=dropout, vectorize=False)
        for checkpointed in (False, True)
    )
    assert all(map(torch.equal, plain, again))


def test_tasks_draw_their_own_numbers_and_replay_them() -> None:
    """Every replay of a step draws the masks of the step, in the order of the tasks."""
    runs = [
        shifted(CHECKPOINTED[name](), checkpointed=False, dropout=0.2, vectorize=False)
        for name in ("step", "sqrt", "none")
    ]
    assert all(torch.equal(one, other) for found in runs[1:] for one, other in zip(runs[0], found, strict=True))
    net, top = nn.Dropout(0.5), nestor.Variable(torch.zeros(64))
    masks: list[Tensor] = []

    def low(low: Any, top: Any) -> Tensor:
        masks.append(net(torch.ones(64)))
        return (masks[-1] * low() - top()).square().sum()

    variable = nestor.Variable(torch.ones(64))
    program = nestor.Program(
        low=nestor.Problem(variable, low, tasks=2, vectorize=False, response=nestor.FiniteDifference()),
        top=nestor.Problem(top, lambda low: low().sum()),
    )
    program.hypergradient("top")
    alone = masks.pop(0)  # the first task alone, to inspect its graph
    assert len(masks) == 4
    assert torch.equal(alone, masks[0])
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_checkpointing_cannot_be_mapped() -> None:
    """It is noticed in the gradient, at the first step."""
    with pytest.warns(nestor.NestorWarning, match="vectorize=False"):
        found = shifted(nestor.T1T2(), checkpointed=True, dropout=0.0)
    expected = shifted(nestor.T1T2(), checkpointed=False, dropout=0.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["t1t2", "step", "forward"])
def test_tasks_in_turn_equal_tasks_at_once(name: str) -> None:
    """And so do the levels' own steps."""
    mapped, in_turn = (
        shifted(CHECKPOINTED[name](), checkpointed=False, dropout=0.0, vectorize=vectorize)
        for vectorize in (True, False)
    )
    for one, other in zip(mapped, in_turn, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_no_reason(precision: str) -> None:
    """Products of other shapes round in other ways: nothing is warned of, and both ways agree to half precision."""
    ends = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        meta = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        fast = copy.deepcopy(meta)
        program = nestor.Program(
            fast=nestor.Problem(
                fast,
                lambda batch, fast: F.mse_loss(fast(batch[0][:, 0]), batch[1]),
                data=[tuple(t.float() for t in SUPPORT)],
                optimizer=torch.optim.SGD(fast.parameters(), lr=0.1),
                init="meta",
                tasks=TASKS,
                vectorize=vectorize,
                response=nestor.FirstOrder(),
            ),
            meta=nestor.Problem(
                meta,
                lambda batch, fast: F.mse_loss(fast(batch[0][:, 0]), batch[1]),
                data=[tuple(t.float() for t in QUERY)],
                optimizer=torch.optim.SGD(meta.parameters(), lr=0.1),
            ),
        )
        nestor.Engine(program, seed=0, precision=precision).run(3)
        ends.append([p.detach().clone() for p in meta.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"vectorize": False}])
def test_the_comparison_of_both_ways_is_not_counted(options: dict[str, Any]) -> None:
    """Neither at the first step nor later: one evaluation of the loss for each step, whatever the number of tasks."""
    meta = make("padding_idx")
    fast = copy.deepcopy(meta)
    lower = {"optimizer": torch.optim.SGD(fast.parameters(), lr=0.1), "unroll_steps": STEPS, "tasks": TASKS, **options}
    program = nestor.Program(
        fast=nestor.Problem(fast, query, data=[SUPPORT], init="meta", response=nestor.FirstOrder(), **lower),
        meta=nestor.Problem(meta, query, data=[QUERY], optimizer=torch.optim.SGD(meta.parameters(), lr=0.1)),
    )
    engine = nestor.Engine(program, seed=0)
    for _ in range(2):
        with nestor.diagnostics.count_evaluations(program) as count:
            engine.run(STEPS)
        assert count.forwards == {"fast": STEPS, "meta": 1}
        assert count.gradients == {"fast": STEPS, "meta": 1}
