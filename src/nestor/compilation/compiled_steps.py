"""Compiled optimizer steps, of one level or of several levels at once."""

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.autodiff.instruments import require_true
from nestor.autodiff.torch_private import hooks_of
from nestor.compilation.arguments import ArgumentCache, Arguments, Unpack, Unsuitable, with_tensors
from nestor.compilation.constancy import check_constant
from nestor.compilation.graph import GraphCache, Traced
from nestor.compilation.placeholders import PlaceholderRun, StepsLayout
from nestor.data.draws import Draw
from nestor.errors import NestorError, NestorWarning
from nestor.levels.evaluator import Direct
from nestor.levels.level import Gradient
from nestor.levels.nesting import BestResponse
from nestor.optim.rules import rule_of
from nestor.optim.stepper import is_of_torch
from nestor.solvers import SolveState
from nestor.training.guard import FiniteGuard
from nestor.training.level_state import LevelState
from nestor.training.stepper import Stepper
from nestor.vectors import algebra

Steps = Mapping[str, Sequence[tuple[Draw, ...]]]
"""For each level, the batches of its steps."""


class CompiledSteps:
    """Takes steps of levels by graphs, which are compiled at their first use.

    Args:
        stepper: Takes the steps that are not compiled.
        guard: Receives the flags of steps that are checked later.

    Attributes:
        reasons: The reasons why levels step eagerly, by level name.
        states: The state of each level, by name.
    """

    def __init__(self, stepper: Stepper, guard: FiniteGuard) -> None:
        self.reasons: dict[str, str] = {}
        self.states = stepper.states
        self._stepper = stepper
        self._guard = guard
        self._graphs = GraphCache()
        self._cache = ArgumentCache()
        self._reads: dict[tuple[str, ...], list[str]] = {}
        self._rated: dict[str, bool] = {}
        self._variables = [p for level in stepper.evaluator.levels.values() for p in level.parameters]
        for name, state in stepper.states.items():
            optimizer = state.level.problem.optimizer
            self._rated[name] = optimizer is not None and rule_of(optimizer) is not None
            reason = _unsuitable(state)
            if reason is not None:
                self.refuse([name], reason)

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Make some levels step eagerly from now on, with a warning."""
        self.reasons.update(dict.fromkeys(names, reason))
        levels = " and ".join(map(repr, names))
        warnings.warn(
            f"Engine(compile=True): level {levels} steps eagerly, because {reason}.", NestorWarning, stacklevel=2
        )

    def is_graph(self, name: str) -> bool:
        """Return whether the next step of a level can be one graph, alone or with other levels."""
        below = self._stepper.evaluator.below(name)[:-1]
        # The first step creates the optimizer's state. A response that needs a history is not part of a graph.
        has_stepped = self.states[name].steps > 0
        return name not in self.reasons and has_stepped and not any(self.states[b].history for b in below)

    def take(self, names: Sequence[str], step: int) -> bool:
        """Take one step of each given level, on the current draws, by one graph.

        Args:
            names: The levels.
            step: The number of the engine step, for errors.

        Returns:
            Whether the steps were taken. If not, nothing has changed, and an eager step raises the error.
        """
        if not self.is_graph(names[0]):  # all other levels of a group are graphs
            return len(names) == 1 and self._take_in_parts(self.states[names[0]], step)
        for name in names:
            state = self.states[name]
            noted = self._stepper.note(state)
            if noted is not None:
                noted.extend(state.level.loss.buffer_values() for _ in state.draws.latest)
        taken = False
        try:
            taken = self.run(names, {name: [self.states[name].draws.latest] for name in names}, step)
        except Unsuitable as error:
            self.refuse(names, str(error))
        finally:
            if not taken:
                for history in (self.states[name].history for name in names):
                    if history is not None:
                        history.forget_last()
        return taken

    def run(self, names: Sequence[str], own: Steps, step: int) -> bool:
        """Take steps by one graph; return whether they were taken.

        Args:
            names: The levels in the order in which they step; one may step several times.
            own: The batches of their steps.
            step: The number of the last engine step, for errors.

        Raises:
            Unsuitable: If the steps cannot be one graph.
        """
        arguments, placed = self._pack(names, own)

        def trace(*tensors: Tensor) -> Traced:
            run = placed(iter(tensors))
            run.take(names)
            return run.results(list(dict.fromkeys(names)))

        graph = self._graphs.get(arguments, trace)
        with torch.no_grad():
            found = graph(arguments.tensors)
            holds = found[-1]
            if holds.device.type == "cpu" and not bool(holds):
                return False
            self._accept(list(dict.fromkeys(names)), graph.layout, iter(found), holds, step)
        return True

    def reads(self, names: Sequence[str]) -> list[str]:
        """Name the levels that are evaluated when some levels step."""
        key = tuple(names)
        if key not in self._reads:
            self._reads[key] = list(dict.fromkeys(r for name in names for r in self._stepper.evaluator.below(name)))
        return self._reads[key]

    def _by_level(self, variables: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Split tensors in the order of all levels' variables."""
        flat = iter(variables)
        return {name: [next(flat) for _ in level.parameters] for name, level in self._stepper.evaluator.levels.items()}

    def _pack(self, names: Sequence[str], own: Steps, *key: Hashable) -> tuple[Arguments, Unpack[PlaceholderRun]]:
        """Pack everything that the steps of some levels depend on."""
        evaluator = self._stepper.evaluator
        for name in self.reads(names):
            check_constant(evaluator.levels[name])
        arguments = Arguments(self._cache, *key, tuple(names))
        variables = arguments.add_variables(self._variables)
        updates: dict[str, Unpack[tuple[list[dict[str, Any]], list[dict[str, Any]]]]] = {}
        for name in dict.fromkeys(names):
            state = self.states[name]
            optimizer = state.level.problem.optimizer
            groups = () if optimizer is None else optimizer.param_groups
            updates[name] = arguments.add_update(name, state.memory.read(), groups, rated=self._rated[name])
        draws = {n: arguments.add_draws(n, own.get(n) or [self.states[n].draws.latest]) for n in self.reads(names)}
        resting = [n for n in draws if n not in updates]
        noted = {n: arguments.add_noted(self.states[n].uppers_then) for n in resting}

        def placed(flat: Iterator[Tensor]) -> PlaceholderRun:
            tensors = self._by_level(variables(flat))
            slots, rules = {}, {}
            for name, unpack in updates.items():
                slots[name], groups = unpack(flat)
                rule = evaluator.levels[name].stepping.rule()
                rules[name] = rule.with_groups(groups) if groups else rule
            batches = {name: unpack(flat) for name, unpack in draws.items()}
            values = {name: unpack(flat) for name, unpack in noted.items()}
            return PlaceholderRun(evaluator, tensors, slots, rules, batches, values)

        return arguments, placed

    def _accept(
        self, names: Sequence[str], layout: StepsLayout, found: Iterator[Tensor], holds: Tensor, step: int
    ) -> None:
        """Write the results of a graph into the states of the levels."""
        for name in names:
            state = self.states[name]
            level = state.level
            algebra.copy_(level.parameters, [next(found) for _ in level.parameters])
            slots, names_of_metrics, stats = layout[name]
            state.memory.write(with_tensors(slots, found))
            loss, norm = next(found), next(found)
            metrics = {key: next(found) for key in names_of_metrics}
            for lower, (keys, notice) in stats.items():
                solve = state.solves.setdefault(lower, SolveState())
                solve.notice = notice
                solve.note({key: next(found) for key in keys})
            gradient = Gradient(loss, metrics, [], norm, {})
            state.metrics.record(gradient)
            if holds.device.type != "cpu":
                self._guard.defer(holds, level, gradient, step)
            if level.problem.scheduler is not None:
                level.problem.scheduler.step()

    def _take_in_parts(self, state: LevelState, step: int) -> bool:
        """Take a step whose responses need histories: compile its direct part and its update only."""
        level = state.level
        is_suitable = level.name not in self.reasons and state.steps and state.history is None
        if not is_suitable or level.parameters[0].device.type != "cpu":
            return False
        try:
            self._stepper.take(state, step, commit=self._update, direct=lambda below: self._direct(state, below))
        except Unsuitable as error:
            self.refuse([level.name], str(error))
            return False
        except NestorError:
            return False
        return True

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
        variables = arguments.add_variables(self._variables)
        draws = arguments.add_draws(level.name, [state.draws.latest])

        def trace(*tensors: Tensor) -> Traced:
            flat = iter(tensors)
            placed = self._by_level(algebra.leaves(variables(flat)))
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
        arguments, placed = self._pack([name], {name: [state.draws.latest]}, "update")
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
            self._accept([name], graph.layout, iter(found), found[-1], step)
        return True


def _unsuitable(state: LevelState) -> str | None:
    """Return the reason why the level's step cannot be compiled, if the reason is known before tracing."""
    level, loss, history = state.level, state.level.loss, state.history
    if loss.placements is not None:
        return "its steps are those of several processes"
    if loss.precision is not None:
        return "its losses run in half precision"
    if loss.buffers:
        return f"the modules that its loss reads have buffers ({loss.buffers[0][0]}), which a graph does not move"
    if level.stepping.optimizer is not None and hooks_of(level.stepping.optimizer, Optimizer):
        return "its optimizer has step hooks"
    if level.stepping.learned:
        return "hyperparameters of its optimizer are learned"
    if (own := level.stepping.optimizer) is not None and not is_of_torch(own):
        return f"{type(own).__name__} is not one of torch.optim, and a graph reads no attributes"
    if history is not None and (history.spec.gradients or history.spec.input_gradients):
        return f"its response, {level.response.describe()}, keeps the gradients of the run"
    return None
