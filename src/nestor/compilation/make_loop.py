"""The loop of an engine, eager or compiled."""

from collections.abc import Callable

from nestor.compilation.compiled_loop import CompiledLoop
from nestor.compilation.step_compiler import with_compiled_replays
from nestor.distributed import Runtime
from nestor.levels.evaluator import Evaluator
from nestor.training.guard import FiniteGuard
from nestor.training.in_place import InPlace
from nestor.training.level_state import LevelState
from nestor.training.loop import Loop, Schedule
from nestor.training.run_checks import RunChecks
from nestor.training.stepper import Stepper


def make_loop(
    evaluator: Evaluator,
    seed: int,
    runtime: Runtime,
    is_observed: Callable[[int], bool],
    *,
    rollback: bool,
    compile: bool,
    check: bool | int,
) -> Loop | CompiledLoop:
    """Return the loop that takes the steps of a program; for the options, see :class:`nestor.Engine`.

    ``is_observed(step)`` returns whether a callback must run after the step of each level in an engine step.
    """
    if compile:
        evaluator = with_compiled_replays(evaluator)
    states = {name: LevelState(level, seed, runtime) for name, level in evaluator.levels.items()}
    guard = FiniteGuard()
    stepper = Stepper(evaluator, states, InPlace(evaluator.levels, guard), rollback=rollback)
    if check:
        stepper.checks = RunChecks(evaluator, None if check is True else check)
        stepper.checks.guard_replays(states)
    loop = Loop(Schedule(states), stepper, guard, rollback=rollback)
    return CompiledLoop(loop, is_observed) if compile else loop
