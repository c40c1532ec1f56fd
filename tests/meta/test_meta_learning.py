"""Meta-learning: tasks at once equal tasks one by one, and the closed forms of MAML, FOMAML, iMAML, ANIL, Reptile."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.optim import functional_step

TASKS = 4


def batches(seed: int) -> tuple[Tensor, Tensor]:
    """Sine-like tasks: a leading task dimension."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, 5, 2, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, TASKS, dtype=torch.float64)[:, None]
    return x, torch.sin(scale * x.sum(2))


class Net(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Predict a number."""
        return self.head(self.body(x)).squeeze(1)


def adapt(batch: Any, fast: Any, meta: Any) -> Tensor:
    """Fit the task, near the start (the proximal term of iMAML)."""
    x, y = batch
    near = sum((p - q).square().sum() for p, q in zip(fast.parameters(), meta.parameters(), strict=True))
    return F.mse_loss(fast(x), y) + 0.5 * near


def query(batch: Any, fast: Any) -> Tensor:
    """Loss on new points of the task."""
    x, y = batch
    return F.mse_loss(fast(x), y)


Make = Callable[[Any], torch.optim.Optimizer]


def build(
    response: nestor.Response, optimizer: Make, tasks: int | None, support: Any, target: Any, **options: Any
) -> nestor.Program:
    meta = Net()
    fast = copy.deepcopy(meta)
    return nestor.Program(
        fast=nestor.Problem(
            fast,
            adapt,
            optimizer=optimizer(fast.parameters()),
            data=[support],
            unroll_steps=3,
            init="meta",
            tasks=tasks,
            response=response,
            **options,
        ),
        meta=nestor.Problem(meta, query, optimizer=torch.optim.SGD(meta.parameters(), lr=1.0), data=[target]),
    )


RESPONSES: dict[str, nestor.Response] = {
    "unrolled": nestor.Unrolled(),
    "unrolled-none": nestor.Unrolled(checkpoint="none"),
    "first-order": nestor.FirstOrder(),
    "implicit": nestor.Implicit(solver=nestor.NormalConjugateGradient(max_steps=300, rtol=1e-13)),
    "t1t2": nestor.T1T2(),
    "sama": nestor.SAMA(cross=nestor.ReverseMode()),
}
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_tasks_at_once_equal_tasks_one_by_one(name: str, optimizer: str, clip: float | None) -> None:
    """The mean over single-task programs, to 1e-10."""
    support, target = batches(1), batches(2)
    both = {"fast": support, "meta": target}
    got = build(RESPONSES[name], OPTIMIZERS[optimizer], TASKS, support, target, clip_norm=clip).hypergradient(
        "meta", both
    )
    singles = []
    for task in range(TASKS):
        one, other = (tuple(t[task] for t in pair) for pair in (support, target))
        program = build(RESPONSES[name], OPTIMIZERS[optimizer], None, one, other, clip_norm=clip)
        singles.append(program.hypergradient("meta", {"fast": one, "meta": other}))
    for key, value in got.items():
        expected = torch.stack([single[key] for single in singles]).mean(0)
        assert (value - expected).norm() <= 1e-10 * max(expected.norm().item(), 1e-3), key


@pytest.mark.parametrize("name", ["unrolled", "unrolled-none", "first-order", "sama"])
@pytest.mark.parametrize("tasks", [None, TASKS])
def test_engine_does_what_the_program_says(name: str, tasks: int | None) -> None:
    """A run's meta step is the hypergradient of the adaptation that it has just done."""
    support, target = batches(1), batches(2)
    if tasks is None:
        support, target = (tuple(t[0] for t in pair) for pair in (support, target))
    program = build(RESPONSES[name], OPTIMIZERS["adam"], tasks, support, target)
    expected = program.hypergradient("meta", {"fast": support, "meta": target})
    before = {k: p.detach().clone() for k, p in program.levels["meta"].problem.module.named_parameters()}
    engine = nestor.Engine(program, seed=0)
    engine.run(3)
    after = dict(program.levels["meta"].problem.module.named_parameters())
    for key in expected:
        torch.testing.assert_close(before[key] - after[key], expected[key], rtol=1e-9, atol=1e-11)
    engine.run(1)  # a new cycle starts from the new meta parameters
    first = program.levels["fast"].parameters[0].detach()
    start = program.levels["meta"].parameters[0].detach()
    assert (first - start).abs().max() < 0.03


def test_maml_by_hand() -> None:
    """One graph through the adaptation of each task."""
    support, target = batches(1), batches(2)
    program = build(nestor.Unrolled(), OPTIMIZERS["sgd"], TASKS, support, target)
    got = program.hypergradient("meta", {"fast": support, "meta": target})
    meta = Net()
    names = [n for n, _ in meta.named_parameters()]
    start = [p.detach().clone().requires_grad_() for p in meta.parameters()]
    total = torch.zeros((), dtype=torch.float64)

    def evaluate(params: list[Tensor], x: Tensor) -> Tensor:
        tensors = dict(zip(names, params, strict=True)) | {n: b.clone() for n, b in meta.named_buffers()}
        return torch.func.functional_call(meta, tensors, (x,))

    optimizer = torch.optim.SGD(meta.parameters(), lr=0.05)
    for task in range(TASKS):
        params, state = start, None
        for _ in range(3):
            near = sum((p - q).square().sum() for p, q in zip(params, start, strict=True))
            loss = F.mse_loss(evaluate(params, support[0][task]), support[1][task]) + 0.5 * near
            grads = torch.autograd.grad(loss, params, create_graph=True)
            params, state = functional_step(optimizer, params, grads, state)
        total = total + F.mse_loss(evaluate(params, target[0][task]), target[1][task]) / TASKS
    expected = torch.autograd.grad(total, start)
    for value, key in zip(expected, names, strict=True):
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)


def test_anil_adapts_the_head_only() -> None:
    """The head starts from the head of the meta level; the body gets its gradient through both losses."""
    meta = Net()
    fast = copy.deepcopy(meta)
    support, target = batches(1), batches(2)

    def fit(batch: Any, fast: Any, meta: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(fast.head(meta.body(x)).squeeze(1), y)

    program = nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            variables=fast.head.parameters(),
            optimizer=torch.optim.SGD(fast.head.parameters(), lr=0.1),
            unroll_steps=2,
            init="meta",
            tasks=TASKS,
            response=nestor.Unrolled(),
            data=[support],
        ),
        meta=nestor.Problem(meta, fit, optimizer=torch.optim.SGD(meta.parameters(), lr=1.0), data=[target]),
    )
    both = {"fast": support, "meta": target}
    got = program.hypergradient("meta", both)
    parameters = dict(meta.named_parameters())
    for key in ("body.0.weight", "head.bias"):
        flat = parameters[key].data.view(-1)
        ends = []
        for sign in (1, -1):
            flat[0] += sign * 1e-5
            ends.append(program.objective("meta", both).item())
            flat[0] -= sign * 1e-5
        expected = (ends[0] - ends[1]) / 2e-5
        assert abs(got[key].view(-1)[0].item() - expected) <= 1e-6 * abs(expected)


def test_reptile() -> None:
    """The step towards the adapted parameters, as a loss: half the squared distance, the adapted ones detached."""
    support = batches(1)
    meta = Net()
    fast = copy.deepcopy(meta)

    def fit(batch: Any, fast: Any) -> Tensor:
        return F.mse_loss(fast(batch[0]), batch[1])

    def towards(fast: Any, meta: Any) -> Tensor:
        pairs = zip(fast.parameters(), meta.parameters(), strict=True)
        return 0.5 * sum((q - p.detach()).square().sum() for p, q in pairs)

    program = nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            optimizer=torch.optim.SGD(fast.parameters(), lr=0.05),
            unroll_steps=3,
            init="meta",
            tasks=TASKS,
            response=nestor.FirstOrder(),
            data=[support],
        ),
        meta=nestor.Problem(meta, towards, optimizer=torch.optim.SGD(meta.parameters(), lr=0.5)),
    )
    before = [p.detach().clone() for p in meta.parameters()]
    nestor.Engine(program, seed=0).run(3)
    adapted = [p.detach().mean(0) for p in program.levels["fast"].parameters]
    for start, end, now in zip(before, adapted, meta.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), start + 0.5 * (end - start), rtol=1e-10, atol=1e-12)


def test_imaml_is_exact_at_the_adapted_parameters() -> None:
    """Adapted to convergence, implicit and unrolled differentiation are the same; the init drops out."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(TASKS, 8, 3, generator=generator, dtype=torch.float64)
    labels = torch.randn(TASKS, 8, generator=generator, dtype=torch.float64)

    def build_ridge(response: nestor.Response) -> nestor.Program:
        meta, fast = (nn.Linear(3, 1, bias=False).double() for _ in range(2))
        nn.init.constant_(meta.weight, 0.3)
        return nestor.Program(
            fast=nestor.Problem(
                fast,
                adapt_linear,
                optimizer=torch.optim.SGD(fast.parameters(), lr=0.2),
                unroll_steps=400,
                init="meta",
                tasks=TASKS,
                response=response,
            ),
            meta=nestor.Problem(meta, lambda batch, fast: F.mse_loss(fast(batch[0]).squeeze(1), batch[1])),
        )

    def adapt_linear(batch: Any, fast: Any, meta: Any) -> Tensor:
        return F.mse_loss(fast(batch[0]).squeeze(1), batch[1]) + (fast.weight - meta.weight).square().sum()

    both = {"fast": (features, labels), "meta": (features.flip(1), labels)}
    unrolled = build_ridge(nestor.Unrolled()).hypergradient("meta", both)["weight"]
    implicit = build_ridge(nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=30, rtol=1e-12))).hypergradient(
        "meta", both
    )["weight"]
    torch.testing.assert_close(implicit, unrolled, rtol=1e-8, atol=1e-10)


def test_episodes_keep_tasks_together() -> None:
    """Three support draws, then the query of the same episode; a query out of turn is an error."""
    source = [(("support", k), ("query", k)) for k in range(3)]
    episodes = nestor.Episodes(source, steps=3)
    seen: list[Any] = []

    class Note(nestor.Variable):
        pass

    fast, meta = Note(torch.zeros(2)), Note(torch.ones(2))

    def note(batch: Any, fast: Any) -> Tensor:
        seen.append(batch)
        return (fast() ** 2).sum()

    program = nestor.Program(
        fast=nestor.Problem(
            fast,
            note,
            data=episodes.support,
            optimizer=torch.optim.SGD(fast.parameters(), lr=0.1),
            unroll_steps=3,
            init="meta",
            response=nestor.FirstOrder(),
        ),
        meta=nestor.Problem(meta, note, data=episodes.query, optimizer=torch.optim.SGD(meta.parameters(), lr=0.1)),
    )
    nestor.Engine(program, seed=0).run(12)
    expected = [("support", k) for k in range(3) for _ in range(3)] + [("support", 0)] * 3
    assert [b for b in seen if b[0] == "support"] == expected
    assert [b[1] for b in seen if b[0] == "query"] == [0, 1, 2, 0]
    with pytest.raises(nestor.NestorError, match=r"episodes\.support"):
        next(iter(nestor.Episodes(source).query))
    with pytest.raises(ValueError, match="steps=0"):
        nestor.Episodes(source, steps=0)


def test_maml_learns_sinusoids() -> None:
    """A few gradient steps from the learned start fit a new sine far better than from a random one."""
    torch.manual_seed(0)

    class Sines:
        def __iter__(self) -> Any:
            while True:
                phase, points = 3.1416 * torch.rand(8, 1, 1), 10 * torch.rand(8, 20, 1) - 5
                values = torch.sin(points + phase)
                yield (points[:, :10], values[:, :10]), (points[:, 10:], values[:, 10:])

    def fit(batch: Any, fast: Any) -> Tensor:
        return F.mse_loss(fast(batch[0]), batch[1])

    meta = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    fast = copy.deepcopy(meta)
    episodes = nestor.Episodes(Sines(), steps=5)
    program = nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            data=episodes.support,
            optimizer=torch.optim.SGD(fast.parameters(), lr=0.02),
            unroll_steps=5,
            init="meta",
            tasks=8,
            response=nestor.Unrolled(checkpoint="none"),
        ),
        meta=nestor.Problem(meta, fit, data=episodes.query, optimizer=torch.optim.Adam(meta.parameters(), lr=3e-3)),
    )
    torch.manual_seed(7)
    support, query = next(iter(Sines()))
    before = program.objective("meta", {"fast": support, "meta": query}).item()
    nestor.Engine(program, seed=0).run(5 * 300)
    after = program.objective("meta", {"fast": support, "meta": query}).item()
    assert after < 0.5 * before


def test_dropout_differs_between_tasks() -> None:
    """Each task has its own mask."""
    net = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5)).double()
    seen = []

    def loss(batch: Any, net: Any) -> Tensor:
        out = net(batch)
        return out.sum() * 1.0

    def upper(net: Any, w: Any) -> dict[str, Tensor]:
        value = net(torch.ones(1, 2, dtype=torch.float64))
        return {"loss": value.square().mean() * w(), "zeros": (value == 0).double().mean()}

    w = nestor.Variable(torch.tensor(1.0).double())
    program = nestor.Program(
        net=nestor.Problem(
            net,
            loss,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            tasks=3,
            response=nestor.FirstOrder(),
            data=[torch.ones(3, 1, 2).double()],
        ),
        w=nestor.Problem(w, upper, optimizer=torch.optim.SGD(w.parameters(), lr=0.1)),
    )
    nestor.Engine(program, seed=0).run(1)
    moved = [p.detach() for p in program.levels["net"].parameters]
    seen = moved[0].sum(2)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_errors_name_the_remedy() -> None:
    """A batch without tasks, another shape, an unknown start, an optimizer that looks at whole matrices."""
    support, target = batches(1), batches(2)
    program = build(nestor.Unrolled(), OPTIMIZERS["sgd"], TASKS, support, target)
    with pytest.raises(nestor.LossError, match="leading dimension"):
        program.hypergradient("meta", {"fast": tuple(t[:2] for t in support), "meta": target})
    net, other = nn.Linear(2, 1), nn.Linear(3, 1)

    def declare(**options: Any) -> nestor.Program:
        return nestor.Program(
            fast=nestor.Problem(net, lambda batch, fast: fast(batch).sum(), response=nestor.Unrolled(), **options),
            meta=nestor.Problem(other, lambda batch, fast, meta: fast(batch).sum() + meta(batch).sum()),
        )

    with pytest.raises(ValueError, match=r"init='meta' cannot start it.*deepcopy"):
        declare(init="meta")
    with pytest.raises(ValueError, match="init='start' is not the name"):
        declare(init="start")
    with pytest.raises(ValueError, match="element by element; LBFGS"):
        nestor.Problem(net, adapt, tasks=2, optimizer=torch.optim.LBFGS(net.parameters()))
    with pytest.raises(ValueError, match="tasks=0"):
        nestor.Problem(net, adapt, tasks=0)
