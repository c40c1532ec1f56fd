"""Accumulation, clipping, schedules, look-ahead, validation and callbacks, each against the same by hand."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import nestor

SGD = torch.optim.SGD


def rows(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low(batch: Tensor, net: Any, lam: Any) -> Tensor:
    return (net(batch) ** 2).mean() + (lam().exp() * net.weight**2).sum() - net(batch).mean()


def up(batch: Tensor, net: Any) -> Tensor:
    return (net(batch) - 1).square().mean()


def make(lower: dict[str, Any] | None = None, upper: dict[str, Any] | None = None, **options: Any) -> nestor.Engine:
    torch.manual_seed(0)
    net, lam = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(3).double())
    lower_fields: dict[str, Any] = {"data": [rows(1)], "optimizer": SGD(net.parameters(), 0.1, momentum=0.9)}
    upper_fields: dict[str, Any] = {"data": [rows(2)], "optimizer": SGD(lam.parameters(), 0.1)}
    program = nestor.Program(
        net=nestor.Problem(net, low, **{**lower_fields, **(lower or {})}),
        lam=nestor.Problem(lam, up, **{**upper_fields, **(upper or {})}),
    )
    return nestor.Engine(program, seed=0, **options)


def values(engine: nestor.Engine) -> list[Tensor]:
    return [p.detach().clone() for level in engine.program.levels.values() for p in level.parameters]


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_accumulated_batches_are_one_batch() -> None:
    """Lower, upper and response average their batches: the same as one large batch."""
    pieces = make({"data": list(rows(1).split(4)), "accumulate": 2}, {"data": list(rows(2).split(2)), "accumulate": 4})
    whole = make()
    pieces.run(5)
    whole.run(5)
    close(values(pieces), values(whole))


@pytest.mark.parametrize("response", [nestor.FiniteDifference(), nestor.Implicit(solver=nestor.DenseSolve())])
def test_accumulated_batches_in_other_responses(response: nestor.Response) -> None:
    """All micro-batches of the last lower step, averaged."""
    pieces = make({"data": list(rows(1).split(4)), "accumulate": 2, "response": response})
    whole = make({"response": response})
    pieces.run(3)
    whole.run(3)
    for x, y in zip(values(pieces), values(whole), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_clipping_is_torchs() -> None:
    """clip_norm scales the gradient as clip_grad_norm_ does, and leaves a short one alone."""
    clipped = make({"clip_norm": 0.05})
    net = copy.deepcopy(clipped.program.levels["net"].problem.module)
    lam = nestor.Variable(torch.zeros(3).double())
    low(rows(1), net, lam).backward()
    assert nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05
    SGD(net.parameters(), 0.1, momentum=0.9).step()
    clipped.run(1)
    for ours, theirs in zip(clipped.program.levels["net"].parameters, net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    loose, plain = make({"clip_norm": 1e6}), make()
    loose.run(3)
    plain.run(3)
    close(values(loose), values(plain))


def test_schedulers_step_once_an_optimizer_step() -> None:
    """OneCycleLR, which many loops get wrong: 6 lower steps, 2 upper steps."""
    net = nn.Linear(3, 1).double()
    optimizer = SGD(net.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20)
    lam = nestor.Variable(torch.zeros(3).double())
    program = nestor.Program(
        net=nestor.Problem(net, low, data=[rows(1)], optimizer=optimizer, scheduler=schedule, unroll_steps=3),
        lam=nestor.Problem(lam, up, data=[rows(2)], optimizer=SGD(lam.parameters(), 0.1)),
    )
    engine = nestor.Engine(program, seed=0)
    engine.run(6)
    assert schedule.last_epoch == 6
    assert engine.states["lam"].steps == 2


@pytest.mark.parametrize("unroll", [1, 3])
def test_rollback_retakes_one_step_with_the_new_upper(unroll: int) -> None:
    """Look ahead, step the upper, go back, take one step on the last batch: momentum included."""
    engine = make({"unroll_steps": unroll}, rollback=True)
    ahead = make({"unroll_steps": unroll})
    for _ in range(2):
        start = copy.deepcopy(engine.program.levels["net"].problem)
        engine.run(unroll)
        # By hand: from the same start, one step with the upper that the engine has now.
        lam = engine.program.levels["lam"].problem.module
        assert start.optimizer is not None
        start.optimizer.zero_grad()
        low(rows(1), start.module, lam).backward()
        start.optimizer.step()
        for ours, theirs in zip(engine.program.levels["net"].parameters, start.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    ahead.run(unroll)
    assert engine.states["lam"].steps == 2


def test_validation_is_in_eval_mode_and_leaves_modes() -> None:
    """Levels by name, no gradients, modes restored; called when due and at the end."""
    seen: list[tuple[bool, bool]] = []

    def validate(net: Any) -> dict[str, Tensor]:
        seen.append((net.training, torch.is_grad_enabled()))
        return {"weight": net.weight.sum()}

    engine = make(validate=validate, validate_every=2)
    result = engine.run(5)
    assert seen == [(False, False)] * 3
    assert engine.program.levels["net"].problem.module.training
    assert result["validation/weight"] == engine.program.levels["net"].parameters[0].sum().item()
    with pytest.raises(ValueError, match="'ne' is the name of no level"):
        make(validate=lambda ne: 0)


def test_run_leaves_the_global_generator_and_grads_alone() -> None:
    """And a second run goes on where the first ended."""
    engine, other = make(), make()
    state = torch.get_rng_state()
    engine.run(2)
    engine.run(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for level in engine.program.levels.values() for p in level.parameters)
    other.run(5)
    close(values(engine), values(other))


class Shuffled:
    """Batches in an order drawn from the global generator, as a DataLoader's."""

    def __iter__(self) -> Any:
        return iter(rows(1)[torch.randperm(8)].split(2))


def test_seed_decides_the_order_of_data() -> None:
    """The same seed gives the same run, bitwise; another does not."""
    runs = []
    for seed in (5, 5, 6):
        engine = make({"data": Shuffled()})
        engine = nestor.Engine(engine.program, seed=seed)
        torch.rand(seed)  # whatever happens outside
        engine.run(7)
        runs.append(values(engine))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_callbacks_are_called_in_order() -> None:
    """Start, steps of levels, engine step, end."""
    events: list[str] = []

    class Record(nestor.callbacks.Callback):
        def on_start(self, engine: nestor.Engine) -> None:
            events.append("start")

        def on_level_step(self, engine: nestor.Engine, level: str) -> None:
            events.append(level)

        def on_step(self, engine: nestor.Engine) -> None:
            events.append(f"step {engine.step}")

        def on_end(self, engine: nestor.Engine, error: BaseException | None) -> None:
            events.append(f"end {error}")

    make(callbacks=[Record()]).run(2)
    assert events == ["start", "net", "lam", "step 1", "net", "lam", "step 2", "end None"]
    with pytest.raises(TypeError, match=r"write Record\(\)"):
        make(callbacks=[Record])


def test_progress_and_json_lines(tmp_path: Path) -> None:
    """A line a level on a terminal, one line now and then elsewhere; metrics that parse."""
    plain, terminal = io.StringIO(), io.StringIO()
    path = tmp_path / "deep" / "metrics.jsonl"
    callbacks = [
        nestor.callbacks.Progress(console=Console(file=plain, force_terminal=False, width=200)),
        nestor.callbacks.Progress("run", console=Console(file=terminal, force_terminal=True, width=120)),
        nestor.callbacks.JSONLines(path, every=2, labels={"run": "a"}),
    ]
    make(callbacks=callbacks, validate=lambda net: net.bias.sum(), validate_every=4).run(4)
    assert len(plain.getvalue().splitlines()) == 1
    assert "step 4/4" in plain.getvalue()
    for word in ("net", "lam", "loss", "steps/s", "left", "validation"):
        assert word in terminal.getvalue()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert {"run", "seconds", "net/loss", "lam/loss", "net/gradient_norm"} <= lines[0].keys()
    assert "validation/value" in lines[1]


def test_nothing_is_read_back_when_nothing_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses stay on the device: no .item() in a run without callbacks but that of the last metrics."""
    reads: list[int] = []
    original = Tensor.item

    def item(self: Tensor) -> Any:
        reads.append(1)
        return original(self)

    engine = make()
    monkeypatch.setattr(Tensor, "item", item)
    engine.run(50)
    assert len(reads) == 4  # loss and gradient norm of two levels, once


def test_profiler_sees_levels_and_phases() -> None:
    """Ranges named after level and phase."""
    theta, weight = nestor.Variable(torch.ones(2)), nestor.Variable(torch.ones(2))
    program = nestor.Program(
        theta=nestor.Problem(
            theta,
            lambda theta, weight: ((theta() - weight()) ** 2).sum(),
            optimizer=torch.optim.SGD(theta.parameters(), lr=0.1),
        ),
        weight=nestor.Problem(
            weight, lambda theta: (theta() ** 2).sum(), optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)
        ),
    )
    engine = nestor.Engine(program, seed=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.run(2)
    names = {event.key for event in profile.key_averages()}
    assert {"theta/gradient", "weight/gradient", "theta/response"} <= names


def test_an_engine_shows_itself() -> None:
    """Levels with their steps, options that are not the default, and callbacks; before and after a run."""
    engine = make({"unroll_steps": 2}, callbacks=[nestor.callbacks.Throughput()], precision="bf16")
    assert repr(engine).splitlines()[0] == "Engine(step 0, seed 0, SingleDevice())"
    engine.run(4)
    assert repr(engine).splitlines() == [
        "Engine(step 4 of 4, seed 0, SingleDevice())",
        "  net  4 steps  Linear of 4, SGD, T1T2, unroll_steps=2, bfloat16",
        "  lam  2 steps  Variable of 3, SGD, bfloat16",
        "  callbacks: Throughput",
    ]
