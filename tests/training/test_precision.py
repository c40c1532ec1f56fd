"""Half precision: near the single-precision hypergradient, and no overflow moves a weight."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

RESPONSES: dict[str, nestor.Response] = {
    "t1t2": nestor.T1T2(),
    "t1t2-forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "fd": nestor.FiniteDifference(rel_step=0.1),
    "cg": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3)),
    "unrolled": nestor.Unrolled(),
}


class Factors:
    """Multiplies losses, for a while."""

    def __init__(self) -> None:
        self.lower = self.upper = self.perturbed = 1.0


def build(response: nestor.Response, factors: Factors | None = None) -> nestor.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))
    weights = nestor.Variable(torch.zeros(16))
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    factors = factors or Factors()
    start = [p.detach().clone() for p in net.parameters()]

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        x, y = batch
        logits = net(x)
        at_start = all(torch.equal(p.detach(), s) for p, s in zip(net.parameters(), start, strict=True))
        factor = factors.lower if at_start else factors.lower * factors.perturbed
        losses = F.cross_entropy(logits * factor, y, reduction="none")
        return (torch.sigmoid(weights()) * losses).mean() + 0.5 * sum(p.square().sum() for p in net.parameters())

    def valid(batch: Any, net: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]) * factors.upper, batch[1])

    return nestor.Program(
        net=nestor.Problem(
            net, train, data=[(x, y)], optimizer=torch.optim.SGD(net.parameters(), lr=0.05), response=response
        ),
        weights=nestor.Problem(
            weights, valid, data=[(x.flip(1), y)], optimizer=torch.optim.SGD(weights.parameters(), lr=1.0)
        ),
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", RESPONSES)
def test_hypergradients_are_near_those_of_single_precision(precision: str, name: str) -> None:
    """The direction to a few per cent; parameters stay in single precision."""
    steps = {}
    for kind in ("fp32", precision):
        program = build(RESPONSES[name])
        nestor.Engine(program, seed=0, precision=kind).run(1)
        weights = program.levels["weights"].parameters[0]
        assert weights.dtype == torch.float32
        steps[kind] = weights.detach().clone()
    assert (steps["fp32"] - steps[precision]).norm() < 0.25 * steps["fp32"].norm()


def test_small_gradients_survive_fp16() -> None:
    """Gradients below the smallest half-precision number: the loss scale carries them through the response."""
    program = build(nestor.T1T2())

    def tiny(batch: Any, net: Any) -> Tensor:
        return 1e-7 * F.cross_entropy(net(batch[0]), batch[1])

    problem = program.levels["weights"].problem
    steps = {}
    for kind in ("fp32", "fp16"):
        program = build(nestor.T1T2())
        net, weights = (program.levels[n].problem.module for n in ("net", "weights"))
        scaled = nestor.Program(
            net=program.levels["net"].problem,
            weights=nestor.Problem(
                weights, tiny, data=problem.data, optimizer=torch.optim.SGD(weights.parameters(), lr=1.0)
            ),
        )
        nestor.Engine(scaled, seed=0, precision=kind).run(1)
        steps[kind] = scaled.levels["weights"].parameters[0].detach().clone()
        assert net is not None
    assert steps["fp32"].norm() > 0
    assert (steps["fp32"] - steps["fp16"]).norm() < 0.1 * steps["fp32"].norm()


def snapshot(program: nestor.Program) -> list[Tensor]:
    return [
        t.detach().clone()
        for level in program.levels.values()
        for t in (*level.problem.module.parameters(), *level.problem.module.buffers())
    ]


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("lower", "t1t2"),
        ("upper", "t1t2"),
        ("upper", "cg"),
        ("upper", "unrolled"),
        ("perturbed", "fd"),
    ],
)
def test_overflow_moves_no_weight(phase: str, name: str) -> None:
    """In the lower step, the upper loss, the perturbed evaluation: skipped, counted, and the run goes on."""
    factors = Factors()
    program = build(RESPONSES[name], factors)
    engine = nestor.Engine(program, seed=0, precision="fp16")
    if phase != "perturbed":
        engine.run(2)
    before = snapshot(program)
    skipped = {n: engine.read_metrics().get(f"{n}/skipped", 0.0) for n in program.levels}
    setattr(factors, phase, 1e30)
    metrics = engine.run(1)
    level = "net" if phase == "lower" else "weights"
    assert metrics[f"{level}/skipped"] == skipped[level] + 1
    after = snapshot(program)
    count = len(list(program.levels["net"].problem.module.state_dict()))
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    if phase == "lower":
        assert not any(moved[:count])  # buffers too
        assert not moved[-1]  # the upper level's response met the same loss
    else:
        assert not moved[-1]
    setattr(factors, phase, 1.0)
    engine.run(2)
    assert all(torch.isfinite(t.float()).all() for t in snapshot(program))
    assert any(not torch.equal(a, b) for a, b in zip(after, snapshot(program), strict=True))


def test_loss_scale_adapts_and_is_saved() -> None:
    """Halved by an overflow; part of the engine's state."""
    factors = Factors()
    program = build(RESPONSES["t1t2"], factors)
    engine = nestor.Engine(program, seed=0, precision="fp16")
    assert engine.run(1)["net/loss_scale"] == 2.0**16
    factors.lower = 1e30
    assert engine.run(1)["net/loss_scale"] == 2.0**14  # by its own step, and by the one above that runs through it
    state = engine.state_dict()
    other = nestor.Engine(build(RESPONSES["t1t2"]), seed=0, precision="fp16")
    other.load_state_dict(state)
    assert other.read_metrics()["net/loss_scale"] == 2.0**14


def test_precision_of_a_level() -> None:
    """A level's own goes before the engine's."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        def loss(batch: Any, **modules: Any) -> Tensor:
            out = modules[name](batch)
            seen[name] = out.dtype
            return out.float().square().mean()

        return loss

    a, b = nn.Linear(2, 2), nn.Linear(2, 2)

    def lower(batch: Any, a: Any, b: Any) -> Tensor:
        return note("a")(batch, a=a) + 0 * (a.weight * b.weight).sum()

    def upper(batch: Any, a: Any, b: Any) -> Tensor:
        return note("b")(batch, b=b) + a.weight.sum() * 0

    program = nestor.Program(
        a=nestor.Problem(a, lower, data=[torch.ones(3, 2)], optimizer=torch.optim.SGD(a.parameters(), lr=0.1)),
        b=nestor.Problem(
            b,
            upper,
            data=[torch.ones(3, 2)],
            optimizer=torch.optim.SGD(b.parameters(), lr=0.1),
            precision="fp32",
        ),
    )
    nestor.Engine(program, seed=0, precision="bf16").run(1)
    assert seen == {"a": torch.bfloat16, "b": torch.float32}
    with pytest.raises(ValueError, match="'fp32', 'bf16', 'fp16'"):
        nestor.Engine(program, precision="half")
    with pytest.raises(ValueError, match="precision='int8'"):
        nestor.Problem(a, lower, precision="int8")


def test_a_single_precision_level_above_skips_too() -> None:
    """An overflow of the lower level's fp16 loss in the response: the upper step is skipped, the lower scale halved."""
    factors = Factors()
    program = build(RESPONSES["fd"], factors)
    problems = {name: level.problem for name, level in program.levels.items()}
    mixed = nestor.Program(
        net=dataclasses.replace(problems["net"], precision="fp16"),
        weights=dataclasses.replace(problems["weights"], precision="fp32"),
    )
    engine = nestor.Engine(mixed, seed=0)
    before = mixed.levels["weights"].parameters[0].detach().clone()
    factors.perturbed = 1e30
    metrics = engine.run(1)
    assert metrics["weights/skipped"] == 1
    assert metrics["net/loss_scale"] == 2.0**15
    assert torch.equal(before, mixed.levels["weights"].parameters[0])


@pytest.mark.ci
@pytest.mark.slow
def test_nothing_leaks() -> None:
    """2,000 engine steps of each response: the number of live tensors and the memory of the process are flat."""
    code = """
import gc, json, resource, sys, torch, nestor
sys.path.insert(0, "tests/training")
from test_precision import RESPONSES, build
torch.set_num_threads(1)
responses = {**RESPONSES, "sama": nestor.SAMA(), "warm": nestor.Implicit(
    solver=nestor.ConjugateGradient(max_steps=3), warm_start=True), "tree": nestor.Unrolled(checkpoint="tree")}
out = {}
for name, response in responses.items():
    engine = nestor.Engine(build(response), seed=0)
    engine.run(200); gc.collect()
    count = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine.run(2000); gc.collect()
    after = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    out[name] = [after - count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]
print(json.dumps(out))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    for name, (tensors, megabytes) in json.loads(run.stdout.splitlines()[-1]).items():
        assert tensors <= 0, name
        assert megabytes < 8, name
