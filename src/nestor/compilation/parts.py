"""A step whose responses need histories, in parts: its direct part and its update are graphs, its responses are not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.autodiff.instruments import require_true
from nestor.compilation.arguments import ArgumentCache, Arguments
from nestor.compilation.constancy import check_constant
from nestor.compilation.graph import GraphCache, Traced
from nestor.compilation.inputs import by_level
from nestor.compilation.plan import Plan
from nestor.levels.evaluator import Direct
from nestor.levels.level import Gradient
from nestor.levels.nesting import BestResponse
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState
from nestor.training.stepper import Stepper
from nestor.vectors import algebra


class StepInParts:
    """Takes steps of levels above histories, on the CPU.

    Args:
        stepper: Takes the step, with the compiled parts.
        graphs: The compiled graphs.
        cache: The cache of arguments.
        guard: Receives the flags of steps that are checked later.
    """

    def __init__(self, stepper: Stepper, graphs: GraphCache, cache: ArgumentCache, guard: FiniteGuard) -> None:
        self._stepper = stepper
        self._graphs = graphs
        self._cache = cache
        self._guard = guard

    def take(self, state: LevelState, step: int) -> None:
        """Take one step of a level.

        Raises:
            Unsuitable: If its loss or its update cannot be compiled.
            NestorError: If the step cannot be taken.
        """
        self._stepper.take(state, step, commit=self._update, direct=lambda below: self._direct(state, below))

    def _direct(self, state: LevelState, below: Sequence[BestResponse]) -> Direct | None:
        """Differentiate the loss with the best responses as variables, by a graph; None if a number is not finite.

        Raises:
            Unsuitable: If the loss cannot be compiled.
        """
        level, evaluator = state.level, self._stepper.evaluator
        lowers = [r.node.level for r in below if r.node.level.name in level.loss.slots]
        if any(response.values is not response.node.level.parameters for response in below):
            return None
        check_constant(level)
        arguments = Arguments(self._cache, "direct", level.name)
        variables = arguments.add_variables([p for other in evaluator.levels.values() for p in other.parameters])
        draws = arguments.add_draws(level.name, [state.draws.latest])

        def trace(*tensors: Tensor) -> Traced:
            flat = iter(tensors)
            placed = by_level(evaluator, algebra.leaves(variables(flat)))
            there = evaluator.with_variables(placed)
            wrt = [*placed[level.name], *(t for lower in lowers for t in placed[lower.name])]
            own = there.levels[level.name]
            with torch.enable_grad():
                loss, metrics, total = there.differentiate(
                    own, draws(flat)[0], lambda draw: own.loss.step_value(draw, {}), wrt
                )
            require_true(torch.isfinite(loss))
            layout = list(metrics), [value is not None for value in total]
            return [loss, *map(torch.as_tensor, metrics.values()), *algebra.present(total)], layout

        graph = self._graphs.get(arguments, trace)
        with torch.no_grad():
            found = graph(arguments.tensors)
        if not bool(found[-1]):
            return None
        results = iter(found)
        loss, metrics = next(results), {metric: next(results) for metric in graph.layout[0]}
        return loss, metrics, [next(results) if is_there else None for is_there in graph.layout[1]]

    def _update(self, state: LevelState, gradient: Gradient, step: int) -> bool:
        """Apply a known gradient by a graph.

        Raises:
            Unsuitable: If the update cannot be compiled.
        """
        name = state.level.name
        plan = Plan([name], self._stepper.evaluator, self._stepper.states, self._cache)
        placed = plan.pack({name: [state.draws.latest]}, "update")
        arguments = plan.arguments
        vector = arguments.add_vector(gradient.values)
        loss = arguments.add_variables([gradient.loss])

        def trace(*tensors: Tensor) -> Traced:
            flat = iter(tensors)
            run = placed(flat)
            values, (value,) = vector(flat), loss(flat)
            there = run.states[name]
            known = Gradient(value, {}, values, there.level.norm(values, value), {})
            run.commit(there, known, 0)
            there.metrics.record(known)
            return run.results([name])

        graph = self._graphs.get(arguments, trace)
        with torch.no_grad():
            found = graph(arguments.tensors)
        if not bool(found[-1]):
            return self._stepper.commit(state, gradient, step)  # raises: a number is not finite
        with torch.no_grad():
            plan.use(graph)
            plan.accept(found, self._guard, step)
        return True
