"""Forecast of the time of a program's updates, from measured evaluations of its losses."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nestor.autodiff.grad import grad, vjp
from nestor.autodiff.instruments import Evaluations, uncounted
from nestor.autodiff.scope import Scope
from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.vectors import algebra

_REPETITIONS = 3


@dataclass(frozen=True)
class LevelTimes:
    """Measured seconds of the evaluations of one level's loss.

    Attributes:
        forward: One evaluation, with a graph.
        gradient: One reverse pass, with respect to all variables that the loss reads.
        hvp: One product of the Hessian with a vector, from the graph of the gradient.
    """

    forward: float
    gradient: float
    hvp: float


def measure(evaluator: Evaluator, batches: Mapping[str, Any], *, twice: bool) -> Mapping[str, LevelTimes]:
    """Evaluate and differentiate the loss of each level on one batch; the shortest of three times counts.

    Args:
        evaluator: Evaluates the losses of the program.
        batches: One batch for each level that takes one, by level name.
        twice: Whether products with Hessians are measured too; their time is zero otherwise.
    """
    randomness = Captured.now()
    with uncounted(), torch.enable_grad():
        return {
            name: _of_level(level, Draw(batches.get(name), randomness), twice=twice)
            for name, level in evaluator.levels.items()
        }


def _of_level(level: Level, draw: Draw, *, twice: bool) -> LevelTimes:
    device = level.parameters[0].device

    def timed(function: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize(device)
        start = time.perf_counter()
        found = function()
        _synchronize(device)
        return time.perf_counter() - start, found

    def once(*, twice: bool) -> tuple[float, float, float]:
        with Scope(twice=twice):
            # A loss may read only the levels below: its gradient is then the cotangent of their responses.
            variables = {name: algebra.leaves(level.loss.variables[name]) for name in level.loss.slots}
            own = [p for tensors in variables.values() for p in tensors]
            forward, value = timed(lambda: level.loss.pure_value(draw, variables))
            backward, gradient = timed(lambda: grad([value], own, create_graph=twice))
            if not twice:
                return forward, backward, 0.0
            vector = [torch.ones_like(p) for p in own]
            product, _ = timed(lambda: vjp(gradient, own, vector))
            return forward, backward, product

    runs = [once(twice=False) for _ in range(_REPETITIONS + 1)][1:]
    products = [once(twice=True)[2] for _ in range(_REPETITIONS)] if twice else [0.0]
    return LevelTimes(min(run[0] for run in runs), min(run[1] for run in runs), min(products))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(cost: Evaluations, times: Mapping[str, LevelTimes]) -> float:
    """Return the seconds of some evaluations."""
    kinds = ((cost.forwards, "forward"), (cost.gradients, "gradient"), (cost.hvps, "hvp"))
    return float(sum(number * getattr(times[name], kind) for counts, kind in kinds for name, number in counts.items()))
