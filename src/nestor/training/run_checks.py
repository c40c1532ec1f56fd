"""Checks at the first responses of a run: losses are functions, and hypergradients are not zero by structure."""

import warnings
from collections.abc import Mapping
from functools import partial
from weakref import ReferenceType, ref

import torch

from nestor.autodiff.instruments import uncounted
from nestor.data.draws import Draw
from nestor.errors import LossError, NestorError, NestorWarning, NotAFunctionError
from nestor.levels.evaluator import Evaluator
from nestor.levels.function_check import check_function
from nestor.levels.level import Gradient, Level
from nestor.optim.history import Histories
from nestor.optim.replay_guard import ReplayGuard
from nestor.responses import FirstOrder
from nestor.training.level_state import LevelState
from nestor.vectors import algebra


def _keeps_solutions(state: ReferenceType[LevelState]) -> bool:
    """Return whether solves of the level start from what the last ones have left, which no replay knows."""
    held = state()
    return held is not None and any(solve.value or solve.memory for solve in held.solves.values())


class RunChecks:
    """Checks the losses and the responses of a run when a level with lowers takes its first step.

    Args:
        evaluator: Evaluates the levels.
        every: Number of steps of a level with lowers after which its checks are repeated; None never repeats them.

    Attributes:
        every: See above.
        began: The levels with lowers that have passed their first checks.
    """

    def __init__(self, evaluator: Evaluator, every: int | None = None) -> None:
        self._evaluator = evaluator
        self.every = every
        self._checked: set[str] = set()  # levels whose loss was checked since the last repetition
        self._guarded_once: dict[str, LevelState] = {}
        self.began: set[str] = set()

    def guard_replays(self, states: Mapping[str, LevelState]) -> None:
        """Make the histories of the run compare replayed steps with the recorded states, where these must agree.

        A frozen middle level is replayed without the responses of its lowers, and a random response or a solve that
        starts from the last one differs in a replay. Steps in fp16 have rounding errors of another kind. None of these
        is compared. Steps of a compiled engine are compared at the first response only, which is eager.
        """
        for state in states.values():
            level = state.level
            is_comparable = level.loss.scaling is None
            compiles = level.stepping.compiler is not None
            lowers = [self._evaluator.levels[name] for name in level.lowers]
            if lowers:
                is_comparable &= self._evaluator.nesting.nested and not any(low.response.is_random for low in lowers)
            if state.history is not None and is_comparable:
                state.history.guard = ReplayGuard(
                    level.name,
                    level.loss.where,
                    space=level.space,
                    loose=bool(lowers) or compiles,
                    differs=partial(_keeps_solutions, ref(state)),
                )
                if compiles:
                    self._guarded_once[level.name] = state

    def before(self, level: Level, histories: Histories) -> None:
        """Check the losses of the levels below that are differentiated.

        Raises:
            NotAFunctionError: If a loss is no function of its arguments.
        """
        if level.name in self.began:
            self._checked.clear()
        for name in self._evaluator.below(level.name)[:-1]:
            lower = self._evaluator.levels[name]
            if name not in self._checked and not isinstance(lower.response, FirstOrder):
                self._checked.add(name)
                self._check_function(lower, histories[name].draws[0])

    def _check_function(self, level: Level, draw: Draw) -> None:
        """Check a loss; an error in one process is an error in all of them."""
        average = self._evaluator.average
        if average is None:
            check_function(level, draw)
            return
        found: Exception | None = None
        try:
            check_function(level, draw)
        except Exception as error:
            found = error
        (share,) = average([torch.tensor(float(found is not None), device=level.parameters[0].device)])
        if found is None and float(share) > 0:
            found = NotAFunctionError(
                "The check that the loss is a function of its arguments has failed in another process, which says why.",
                level=level.name,
                where=level.loss.where,
            )
        if found is not None:
            raise found

    def after(self, level: Level, histories: Histories, gradient: Gradient) -> None:
        """Check that responses contribute to the hypergradient, and compare differences with exact derivatives.

        Raises:
            LossError: If the hypergradient is zero by structure.
        """
        below = [self._evaluator.levels[name] for name in self._evaluator.below(level.name)[:-1]]
        is_first = level.name not in self.began
        for lower in below:
            state = self._guarded_once.pop(lower.name, None)
            if state is not None and state.history is not None:
                state.history.guard = None  # with a guard, replays are eager
        self.began.add(level.name)
        if not any(level.name in lower.loss.slots for lower in below):
            return  # its variables are hyperparameters of optimizers, which not every step reads
        share = gradient.metrics.get("indirect_share")
        # A number, not a tensor: no response depends on the variables, whatever their values.
        is_zero = isinstance(share, float) and share == 0.0
        if not is_zero and any(b.response.replays_steps for b in below) and float(gradient.norm) == 0:
            # Forward mode and differences along directions return zeros where others return no derivative.
            self._warn(level, "its hypergradient is exactly zero. Do the losses below detach or ignore its variables?")
        if is_zero and not any(isinstance(b.response, FirstOrder) for b in below):
            self._report_no_response(level, below, gradient)
        elif is_first:
            self._compare_differences(level, below, histories, gradient)

    def _report_no_response(self, level: Level, below: list[Level], gradient: Gradient) -> None:
        if any(cotangent is not None for c in gradient.cotangents.values() for cotangent in c):
            names = ", ".join(f"{lower.name!r} (loss {lower.loss.where})" for lower in below)
            cause = (
                f"The losses of the levels below, {names}, do not depend on the variables of {level.name!r}. Does the "
                "loss detach or copy them (.detach(), .data, .item(), torch.tensor(...)), or ignore the argument?"
            )
        else:
            cause = (
                "The loss of the level does not depend on the best responses that it reads. Does it detach them, or "
                "run under no_grad?"
            )
        if all(value is None for value in gradient.values):
            raise LossError(
                f"The hypergradient is zero by structure: nothing would ever move the level. {cause}",
                level=level.name,
                where=level.loss.where,
            )
        self._warn(
            level,
            "only its direct gradient moves it; the part of its hypergradient through responses is zero by structure. "
            f"{cause}",
        )

    def _warn(self, level: Level, message: str) -> None:
        warnings.warn(f"Level {level.name!r}, loss {level.loss.where}: {message}", NestorWarning, stacklevel=2)

    def _compare_differences(self, level: Level, below: list[Level], histories: Histories, gradient: Gradient) -> None:
        exact = {
            b.name: counterpart
            for b in below
            if b.loss.precision is None and (counterpart := b.response.exact_counterpart) is not None
        }
        # Second derivatives of an approximate response are not compared: each method has its own.
        if not exact or (self._evaluator.nesting.nested and len(below) > 1):
            return
        try:
            with uncounted():
                other = self._evaluator.with_responses(exact).gradient(level, histories, statistics=False)
        except (NestorError, RuntimeError, NotImplementedError):
            return  # the loss has no second derivative: differences are all there is
        ours, theirs = (algebra.zeros_for_none(g.values, level.parameters) for g in (gradient, other))
        difference = float(level.space.norm(algebra.subtract(ours, theirs)))
        length = float(level.space.norm(theirs)) * float(other.metrics["indirect_share"])
        if difference > max(self._evaluator.levels[name].response.tolerance for name in exact) * length:
            methods = ", ".join(f"{self._evaluator.levels[name].response.describe()} of {name!r}" for name in exact)
            warnings.warn(
                f"Level {level.name!r}: its hypergradient by {methods} differs from the one with exact derivatives by "
                f"{difference / max(length, 1e-300):.2g} of its length. Does the loss below detach a value "
                "(differences move it too), has something that it reads moved since the lower step (reuse=True), or is "
                "rel_step too large? T1T2() and SAMA(cross=nestor.ForwardMode()) have "
                "exact derivatives.",
                NestorWarning,
                stacklevel=2,
            )
