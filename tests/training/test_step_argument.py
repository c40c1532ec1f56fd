"""The argument ``step`` of losses and update rules: the level's own number of steps, replayed as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.checkpoints.folder import pack, unpack

RATE = 0.1
TARGET = torch.tensor([1.0, 2.0], dtype=torch.float64)
START = torch.tensor([0.3, -0.4], dtype=torch.float64)


def objective(low: Tensor, top: Tensor, step: int) -> Tensor:
    """A warm-up of the target, and a curvature that depends on the step."""
    return (2 + torch.cos(torch.tensor(float(step)))) * ((low - top / (1 + step)) ** 2 + 0.2 * (top * low).sin()).sum()


def judge(low: Tensor) -> Tensor:
    """A gentle loss of the level above: its steps are long."""
    return 0.05 * (low**2).sum()


def variables() -> tuple[nestor.Variable, nestor.Variable]:
    return nestor.Variable(START.clone()), nestor.Variable(TARGET.clone())


def build(
    response: nestor.Response, *, steps: int = 5, accumulate: int = 1, seen: list[int] | None = None, **options: Any
) -> tuple[nestor.Program, nestor.Variable]:
    low, top = variables()

    def low_loss(low: nestor.Variable, top: nestor.Variable, step: int) -> Tensor:
        if seen is not None:
            seen.append(step)
        return objective(low(), top(), step)

    def top_loss(low: nestor.Variable) -> Tensor:
        return judge(low())

    sgd = torch.optim.SGD(low.parameters(), lr=RATE)
    program = nestor.Program(
        low=nestor.Problem(
            low, low_loss, optimizer=sgd, unroll_steps=steps, response=response, accumulate=accumulate, **options
        ),
        top=nestor.Problem(top, top_loss, optimizer=torch.optim.SGD(top.parameters(), lr=1.0)),
    )
    return program, top


def unrolled(low: Tensor, top: Tensor, steps: range) -> tuple[Tensor, Tensor]:
    """The hypergradient of gradient descent by hand, and the last variables."""
    upper = top.detach().clone().requires_grad_()
    value = low.detach().clone().requires_grad_()
    for step in steps:
        (slope,) = torch.autograd.grad(objective(value, upper, step), value, create_graph=True)
        value = value - RATE * slope
    return torch.autograd.grad(judge(value), upper)[0], value.detach()


@pytest.mark.parametrize("checkpoint", ["step", "none", "sqrt", "tree"])
def test_unrolled_replays_the_step(checkpoint: str) -> None:
    """Three hypergradients: the clock goes on after a step of the level above."""
    program, top = build(nestor.Unrolled(checkpoint=checkpoint))
    engine = nestor.Engine(program, seed=0)
    low = START
    for turn in range(3):
        before = top().detach().clone()
        engine.run(5)
        expected, low = unrolled(low, before, range(5 * turn, 5 * turn + 5))
        torch.testing.assert_close(before - top().detach(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 5])
def test_responses_at_the_last_step(steps: int) -> None:
    """A response that evaluates the objective once takes the step of the level's last batches."""
    cases: dict[str, tuple[nestor.Response, bool]] = {
        "T1T2": (nestor.T1T2(), False),
        "CG": (nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=20, rtol=1e-13)), True),
        "FD": (nestor.FiniteDifference(rel_step=1e-5), False),
    }
    for name, (response, inverse) in cases.items():
        program, top = build(response, steps=steps)
        nestor.Engine(program, seed=0).run(steps)
        low = unrolled(START, TARGET, range(steps))[1].requires_grad_()
        upper = TARGET.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(low, upper, steps - 1), low, create_graph=True)
        v = 0.1 * low.detach()
        if inverse:
            hessian: Any = torch.autograd.functional.hessian(lambda p: objective(p, TARGET, steps - 1), low)
            v = torch.linalg.solve(hessian, v)
        expected = -torch.autograd.grad(slope, upper, v)[0]
        torch.testing.assert_close(TARGET - top().detach(), expected, rtol=1e-7, atol=1e-12, msg=name)


def test_accumulated_batches_belong_to_one_step() -> None:
    seen: list[int] = []
    program, top = build(nestor.Unrolled(), accumulate=3, seen=seen)
    nestor.Engine(program, seed=0).run(5)
    assert seen[:15] == [step for step in range(5) for _ in range(3)]
    torch.testing.assert_close(TARGET - top().detach(), unrolled(START, TARGET, range(5))[0], rtol=1e-11, atol=1e-13)


def test_by_hand_the_steps_start_at_zero() -> None:
    program, _ = build(nestor.Unrolled())
    (got,) = program.hypergradient("top", {}).values()
    torch.testing.assert_close(got, unrolled(START, TARGET, range(5))[0], rtol=1e-11, atol=1e-13)
    value = program.objective("low", {})
    torch.testing.assert_close(value.detach(), objective(START, TARGET, 0))


def test_resumed() -> None:
    whole, _ = build(nestor.Unrolled())
    nestor.Engine(whole, seed=0).run(15)
    first, second = build(nestor.Unrolled())[0], build(nestor.Unrolled())[0]
    engine = nestor.Engine(first, seed=0)
    engine.run(8)
    other = nestor.Engine(second, seed=0)
    other.load_state_dict(unpack(pack(engine.state_dict())))
    other.run(7)
    for name, level in whole.levels.items():
        assert torch.equal(second.levels[name].parameters[0], level.parameters[0]), name


def test_a_look_ahead_counts_its_steps() -> None:
    """The step that is taken after the look-ahead is on its last batch, with the number of that batch."""
    seen: list[int] = []
    program, _ = build(nestor.Unrolled(), steps=3, seen=seen)
    nestor.Engine(program, seed=0, rollback=True).run(6)
    assert seen[:3] == [0, 1, 2]
    assert set(seen) == set(range(6))
    real, low, top = [], START, TARGET
    for turn in range(2):
        (slope, end) = unrolled(low, top, range(3 * turn, 3 * turn + 3))
        top = top - slope
        low = unrolled(low, top, range(3 * turn + 2, 3 * turn + 3))[1]
        real.append(end)
    torch.testing.assert_close(program.levels["top"].parameters[0].detach(), top, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(program.levels["low"].parameters[0].detach(), low, rtol=1e-11, atol=1e-13)


def test_tasks() -> None:
    """A mapped loss gets the same step for every task."""
    low, top = nestor.Variable(torch.zeros(2).double()), nestor.Variable(TARGET.clone())

    def low_loss(batch: Tensor, low: nestor.Variable, top: nestor.Variable, step: int) -> Tensor:
        return objective(low() + batch, top(), step)

    def top_loss(batch: Tensor, low: nestor.Variable) -> Tensor:
        return judge(low() + batch)

    rows = torch.stack([START, 2 * START, -START])
    program = nestor.Program(
        low=nestor.Problem(
            low,
            low_loss,
            data=[rows],
            tasks=3,
            optimizer=torch.optim.SGD(low.parameters(), lr=RATE),
            unroll_steps=4,
            response=nestor.Unrolled(),
        ),
        top=nestor.Problem(top, top_loss, data=[rows], optimizer=torch.optim.SGD(top.parameters(), lr=1.0)),
    )
    nestor.Engine(program, seed=0).run(4)
    expected = torch.stack([unrolled(row, TARGET, range(4))[0] for row in rows]).mean(0)
    torch.testing.assert_close(TARGET - top().detach(), expected, rtol=1e-10, atol=1e-12)


def decayed(params: list[Tensor], grads: list[Tensor], state: Any, step: int, top: nestor.Variable) -> Any:
    return [p - RATE / (1 + step) * (g + top()) for p, g in zip(params, grads, strict=True)], state


@pytest.mark.parametrize("checkpoint", ["step", "none"])
def test_update_rules_read_the_step(checkpoint: str) -> None:
    low, top = variables()

    def low_loss(low: nestor.Variable, top: nestor.Variable) -> Tensor:
        return objective(low(), top(), 1)

    program = nestor.Program(
        low=nestor.Problem(
            low, low_loss, update=decayed, unroll_steps=3, response=nestor.Unrolled(checkpoint=checkpoint)
        ),
        top=nestor.Problem(top, lambda low: judge(low()), optimizer=torch.optim.SGD(top.parameters(), lr=1.0)),
    )
    (by_hand,) = program.hypergradient("top", {}).values()
    engine = nestor.Engine(program, seed=0)
    value = START
    for turn in range(2):
        upper = top().detach().clone().requires_grad_()
        value = value.detach().requires_grad_()
        for step in range(3 * turn, 3 * turn + 3):
            (slope,) = torch.autograd.grad(objective(value, upper, 1), value, create_graph=True)
            value = value - RATE / (1 + step) * (slope + upper)
        expected = torch.autograd.grad(judge(value), upper)[0]
        engine.run(3)
        torch.testing.assert_close(upper.detach() - top().detach(), expected, rtol=1e-11, atol=1e-13)
        if turn == 0:
            torch.testing.assert_close(by_hand, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Engine.compile=True.")
@pytest.mark.parametrize("response", [nestor.Unrolled(), nestor.T1T2()], ids=["Unrolled", "T1T2"])
def test_compiled(response: nestor.Response) -> None:
    """A graph would freeze the number: the levels step eagerly, and the reason is told."""
    program, _ = build(response, steps=2)
    engine = nestor.Engine(program, seed=0, compile=True)
    engine.run(12)
    assert "'step'" in engine.eager_reasons["low"]
    eager, _ = build(response, steps=2)
    nestor.Engine(eager, seed=0).run(12)
    for name, level in eager.levels.items():
        assert torch.equal(program.levels[name].parameters[0], level.parameters[0]), name


def test_explained() -> None:
    program, _ = build(nestor.Unrolled())
    plain = nestor.Program(
        **{
            name: nestor.Problem(
                level.problem.module,
                (lambda low, top: objective(low(), top(), 0)) if name == "low" else level.problem.loss,
                optimizer=level.problem.optimizer,
                unroll_steps=level.problem.unroll_steps,
                response=level.problem.response,
            )
            for name, level in program.levels.items()
        }
    )
    assert str(program.explain()) == str(plain.explain())
    assert program.explain(batches={}).memory is not None


def upper(low: nn.Module) -> Tensor:
    return torch.as_tensor(low().sum())


def program_with(loss: Callable[..., Any], **options: Any) -> nestor.Program:
    low, top = variables()
    return nestor.Program(low=nestor.Problem(low, loss, **options), top=nestor.Problem(top, upper))


def test_forms_of_the_argument() -> None:
    """First, last, keyword-only, with a default value, bound by a partial, in a method or a module."""
    from functools import partial

    def last(batch: float, low: Any, top: Any, step: int = 7) -> Tensor:
        return batch * objective(low(), top(), step)

    def first(step: int, low: Any, top: Any) -> Tensor:
        return objective(low(), top(), step)

    def named(low: Any, top: Any, *, step: int) -> Tensor:
        return objective(low(), top(), step)

    class Module(nn.Module):
        def forward(self, low: Any, top: Any, step: int) -> Tensor:
            return objective(low(), top(), step)

    at = {step: objective(START, TARGET, step) for step in (0, 3)}
    for loss, batches, expected in [
        (last, {"low": 1.0}, at[0]),
        (first, {}, at[0]),
        (named, {}, at[0]),
        (partial(named, step=3), {}, at[3]),
        (Module(), {}, at[0]),
    ]:
        torch.testing.assert_close(program_with(loss).objective("low", batches).detach(), expected)


def test_refused() -> None:
    low, top = variables()
    with pytest.raises(ValueError, match="cannot be called 'step'"):
        nestor.Program(step=nestor.Problem(low, lambda step: step()), top=nestor.Problem(top, lambda step: step()))
    with pytest.raises(ValueError, match="positional-only"):
        program_with(lambda step, /, low, top: objective(low(), top(), step))
    with pytest.raises(ValueError, match="the first argument is the batch"):
        program_with(lambda step, low, top: objective(low(), top(), step), data=[1.0])
    with pytest.raises(ValueError, match="'step' has no meaning"):
        program_with(lambda low, top, step: objective(low(), top(), step), reformulation=nestor.F2SA())
