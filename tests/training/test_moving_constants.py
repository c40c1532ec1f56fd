"""Tensors that a loss reads and no level owns, and that move along the run: a teacher, a target network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.checkpoints.folder import pack, unpack
from nestor.levels import constants as constants_file
from nestor.levels.constants import Constants

RATE, DECAY, STEPS = 0.05, 0.9, 5
START = torch.tensor([0.5, -1.0], dtype=torch.float64)
TARGET = torch.tensor([1.0, 0.7], dtype=torch.float64)


def objective(weight: Tensor, top: Tensor, teacher: Tensor) -> Tensor:
    return ((weight - top) ** 2).sum() + (top * (weight * teacher) ** 2).sum()


def judge(weight: Tensor) -> Tensor:
    return 0.1 * ((weight - 2) ** 2).sum()


class Student(nn.Module):
    """A weight; its teacher is a frozen parameter, a plain attribute, or a module of its own."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(START.clone())
        start = START.clone()
        if place == "parameter":
            self.teacher = nn.Parameter(start, requires_grad=False)
        elif place == "attribute":
            self.teacher = start
        elif place == "buffer":
            self.register_buffer("teacher", start)


@torch.no_grad()
def in_place(owner: Any, weight: Tensor) -> None:
    owner.teacher.mul_(DECAY).add_((1 - DECAY) * weight)


def through_data(owner: Any, weight: Tensor) -> None:
    owner.teacher.data.mul_(DECAY).add_((1 - DECAY) * weight.data)


def other_data(owner: Any, weight: Tensor) -> None:
    owner.teacher.data = DECAY * owner.teacher.data + (1 - DECAY) * weight.data


def other_tensor(owner: Any, weight: Tensor) -> None:
    new = (DECAY * owner.teacher + (1 - DECAY) * weight).detach()
    owner.teacher = nn.Parameter(new, requires_grad=False) if isinstance(owner.teacher, nn.Parameter) else new


WAYS = {"in place": in_place, "data": through_data, "other data": other_data, "other tensor": other_tensor}


class EveryStep(nestor.callbacks.Callback):
    """Moves the teacher after every few steps of the lower level."""

    def __init__(self, move: Callable[[], None], every: int = 1) -> None:
        self.move, self.every, self.count = move, every, 0

    def on_level_step(self, engine: Any, level: str) -> None:
        if level == "low":
            self.count += 1
            if self.count % self.every == 0:
                self.move()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def build(
    response: nestor.Response, place: str = "parameter", move: Any = in_place, *, every: int = 1, inside: bool = False
) -> tuple[nestor.Program, nestor.Variable, nestor.callbacks.Callback, Any]:
    """The program, its upper variable, what moves the teacher, and the module that holds the teacher."""
    student, top = Student(place), nestor.Variable(TARGET.clone())
    teacher: Any = student

    def taught(weight: Tensor, top: Tensor) -> Tensor:
        return objective(weight, top, teacher.teacher)

    if place == "module":
        teacher = nn.Module()
        teacher.teacher = nn.Parameter(START.clone())  # trainable, but no level trains it

    def low_loss(low: Student, top: nestor.Variable) -> Tensor:
        if inside and place == "module":
            shift()
        elif inside:
            move(low, low.weight.detach())
        return taught(low.weight, top()) if place == "module" else objective(low.weight, top(), low.teacher)

    def shift() -> None:
        move(teacher, student.weight.detach())

    def top_loss(low: Student) -> Tensor:
        return judge(low.weight)

    program = nestor.Program(
        low=nestor.Problem(
            student,
            low_loss,
            optimizer=torch.optim.SGD([student.weight], lr=RATE),
            unroll_steps=STEPS,
            response=response,
        ),
        top=nestor.Problem(top, top_loss, optimizer=torch.optim.SGD(top.parameters(), lr=1.0)),
    )
    callback = EveryStep(lambda: None if inside else move(teacher, student.weight.detach()), every)
    return program, top, callback, teacher


class ByHand:
    """The same run in plain torch."""

    def __init__(self, *, every: int = 1, inside: bool = False) -> None:
        self.weight, self.teacher, self.top = START.clone(), START.clone(), TARGET.clone()
        self.every, self.inside, self.count = every, inside, 0

    def moved(self, weight: Tensor) -> None:
        self.teacher = DECAY * self.teacher + (1 - DECAY) * weight.detach()

    def unrolled(self) -> Tensor:
        """Take the steps of one unroll and a step of the level above; return the hypergradient."""
        top = self.top.clone().requires_grad_()
        weight = self.weight.clone().requires_grad_()
        for _ in range(STEPS):
            if self.inside:
                self.moved(weight)
            (slope,) = torch.autograd.grad(objective(weight, top, self.teacher), weight, create_graph=True)
            weight = weight - RATE * slope
            self.count += 1
            if not self.inside and self.count % self.every == 0:
                self.moved(weight)
        (found,) = torch.autograd.grad(judge(weight), top)
        self.weight, self.top = weight.detach(), self.top - found
        return found

    def implicit(self, *, inverse: bool, through: bool = False) -> Tensor:
        """The formula at the variables and the teacher after the steps.

        A difference perturbs the teacher ``through`` the detached weight that it follows.
        """
        self.unrolled()
        teacher = self.teacher
        weight, top = self.weight.clone().requires_grad_(), TARGET.clone().requires_grad_()
        if self.inside:
            teacher = DECAY * teacher + (1 - DECAY) * (weight if through else weight.detach())
        (v,) = torch.autograd.grad(judge(weight), weight)
        if inverse:
            hessian: Any = torch.autograd.functional.hessian(lambda w: objective(w, TARGET, teacher), weight)
            v = torch.linalg.solve(hessian, v)
        (slope,) = torch.autograd.grad(objective(weight, top, teacher), top, create_graph=True)
        jacobian = torch.stack([torch.autograd.grad(row, weight, retain_graph=True)[0] for row in slope])
        return -jacobian @ v


CHECKPOINTS = ["step", "none", "sqrt", "tree"]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("place", ["parameter", "attribute", "module", "buffer"])
def test_unrolled(place: str, checkpoint: str) -> None:
    """Against the same loop by hand, for two steps of the level above."""
    program, top, callback, _ = build(nestor.Unrolled(checkpoint=checkpoint), place)
    engine, hand = nestor.Engine(program, callbacks=[callback], seed=0), ByHand()
    for _ in range(2):
        before = top().detach().clone()
        engine.run(STEPS)
        torch.testing.assert_close(before - top().detach(), hand.unrolled(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["parameter", "attribute"])
def test_however_it_is_moved(place: str, way: str, checkpoint: str) -> None:
    """A change through ``.data`` leaves the version of a tensor alone; others replace its storage or the tensor."""
    program, top, callback, _ = build(nestor.Unrolled(checkpoint=checkpoint), place, WAYS[way])
    nestor.Engine(program, callbacks=[callback], seed=0).run(STEPS)
    torch.testing.assert_close(TARGET - top().detach(), ByHand().unrolled(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("every", [2, 7, 12])
def test_a_target_network_that_is_copied_now_and_then(every: int) -> None:
    program, top, callback, _ = build(nestor.Unrolled(), every=every)
    engine, hand = nestor.Engine(program, callbacks=[callback], seed=0), ByHand(every=every)
    for _ in range(5):
        before = top().detach().clone()
        engine.run(STEPS)
        torch.testing.assert_close(before - top().detach(), hand.unrolled(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("place", ["parameter", "attribute", "module"])
@pytest.mark.parametrize("way", ["in place", "data"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_teacher_that_the_loss_moves(checkpoint: str, way: str, place: str) -> None:
    """The real steps move it; replays and responses leave no trace."""
    program, top, _, teacher = build(nestor.Unrolled(checkpoint=checkpoint), place, WAYS[way], inside=True)
    engine, hand = nestor.Engine(program, seed=0), ByHand(inside=True)
    for _ in range(2):
        before = top().detach().clone()
        engine.run(STEPS)
        torch.testing.assert_close(before - top().detach(), hand.unrolled(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(teacher.teacher.detach(), hand.teacher, rtol=1e-13, atol=0)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("place", ["parameter", "module"])
def test_responses_at_the_present_point(place: str, inside: bool) -> None:
    cases: dict[str, tuple[nestor.Response, bool, float]] = {
        "T1T2": (nestor.T1T2(), False, 1e-11),
        "CG": (nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=20, rtol=1e-13)), True, 1e-9),
        "FD": (nestor.FiniteDifference(rel_step=1e-5), False, 1e-7),
    }
    for name, (response, inverse, tolerance) in cases.items():
        program, top, callback, teacher = build(response, place, inside=inside)
        nestor.Engine(program, callbacks=[callback], seed=0, check=name != "FD").run(STEPS)
        hand = ByHand(inside=inside)
        expected = hand.implicit(inverse=inverse, through=name == "FD")
        torch.testing.assert_close(TARGET - top().detach(), expected, rtol=tolerance, atol=1e-12, msg=name)
        torch.testing.assert_close(teacher.teacher.detach(), hand.teacher, rtol=1e-13, atol=0, msg=name)


def test_sama() -> None:
    """With SGD its preconditioner is the learning rate: T1T2 times the rate, at the present teacher."""
    program, top, callback, _ = build(nestor.SAMA())
    nestor.Engine(program, callbacks=[callback], seed=0).run(STEPS)
    torch.testing.assert_close(TARGET - top().detach(), RATE * ByHand().implicit(inverse=False), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("place", ["parameter", "module"])
def test_by_hand_leaves_no_trace(place: str) -> None:
    """A loss that moves its teacher: ``Program.hypergradient`` does not."""
    for response in (nestor.T1T2(), nestor.FiniteDifference(), nestor.Unrolled(), nestor.Unrolled(checkpoint="none")):
        for move in (in_place, through_data):
            program, _, _, teacher = build(response, place, move, inside=True)
            (first,) = program.hypergradient("top", {}).values()
            assert torch.equal(teacher.teacher.detach(), START)
            (second,) = program.hypergradient("top", {}).values()
            assert torch.equal(first, second)


@pytest.mark.parametrize("checkpoint", ["step", "none"])
@pytest.mark.parametrize("inside", [False, True])
def test_resumed(inside: bool, checkpoint: str) -> None:
    """Cut within an unroll."""

    def engine() -> tuple[nestor.Engine, nestor.Program]:
        program, _, callback, _ = build(nestor.Unrolled(checkpoint=checkpoint), inside=inside)
        return nestor.Engine(program, callbacks=[callback], seed=0), program

    whole, expected = engine()
    whole.run(15)
    first, second = engine()[0], engine()
    first.run(8)
    second[0].load_state_dict(unpack(pack(first.state_dict())))
    second[0].run(7)
    for name, level in expected.levels.items():
        assert torch.equal(second[1].levels[name].parameters[0], level.parameters[0]), name
    modules = [p.levels["low"].problem.module for p in (expected, second[1])]
    assert torch.equal(modules[0].teacher, modules[1].teacher)


def test_a_look_ahead_returns_the_teacher() -> None:
    """Its steps are undone, and so are their moves; the step on the last batch moves it once."""
    program, _, _, teacher = build(nestor.Unrolled(), inside=True)
    engine = nestor.Engine(program, seed=0, rollback=True)
    hand = ByHand(inside=True)
    for turn in range(3):
        weight, before = hand.weight, hand.teacher
        hand.unrolled()
        hand.weight, hand.teacher = weight, before
        hand.moved(weight)
        variable = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(variable, hand.top, hand.teacher), variable)
        hand.weight = weight - RATE * slope
        engine.run(STEPS)
        torch.testing.assert_close(program.levels["top"].parameters[0].detach(), hand.top, msg=f"{turn}")
        torch.testing.assert_close(teacher.teacher.detach(), hand.teacher, msg=f"{turn}")


@pytest.mark.filterwarnings("ignore:Engine.compile=True.")
def test_compiled() -> None:
    """A frozen parameter is an input of a graph; one that moves is noted, eagerly."""
    for every, reasons in [(10**6, 0), (1, 1)]:
        program, _, callback, _ = build(nestor.Unrolled(), every=every)
        engine = nestor.Engine(program, callbacks=[callback], seed=0, compile=True)
        engine.run(4 * STEPS)
        assert ("low" in engine.eager_reasons) == reasons
        hand = ByHand(every=every)
        for _ in range(4):
            hand.unrolled()
        torch.testing.assert_close(program.levels["top"].parameters[0].detach(), hand.top, rtol=1e-10, atol=1e-12)


def test_too_large_to_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; from then on it is right."""
    monkeypatch.setattr(constants_file, "_SMALL", 0)
    program, top, callback, teacher = build(nestor.Unrolled(), "module")
    teacher.more = nn.Parameter(torch.zeros(100))
    program = nestor.Program(**{name: level.problem for name, level in program.levels.items()})
    engine, hand = nestor.Engine(program, callbacks=[callback], seed=0, check=False), ByHand()
    with pytest.warns(nestor.NestorWarning, match=r"constant 'teacher.teacher' has moved for the first time"):
        engine.run(STEPS)
    hand.unrolled()
    hand.top = top().detach().clone()
    for _ in range(2):
        before = top().detach().clone()
        engine.run(STEPS)
        torch.testing.assert_close(before - top().detach(), hand.unrolled(), rtol=1e-11, atol=1e-13)


def test_what_stands_still_is_not_copied_again() -> None:
    program, _, _, _ = build(nestor.Unrolled())
    nestor.Engine(program, seed=0).run(10 * STEPS)
    found = program.levels["low"].loss.reader.constants
    assert isinstance(found, Constants)
    assert not found.moving
    assert found.values()[0] is found.values()[0]
    assert not found.placed(found.values())


def test_a_step_that_fails_leaves_the_teacher() -> None:
    program, _, _, teacher = build(nestor.Unrolled(), inside=True)
    engine = nestor.Engine(program, seed=0)
    engine.run(2)
    before = teacher.teacher.detach().clone()
    with torch.no_grad():
        program.levels["low"].parameters[0].fill_(float("inf"))
    with pytest.raises(nestor.NonFiniteError):
        engine.run(1)
    assert torch.equal(teacher.teacher.detach(), before)
