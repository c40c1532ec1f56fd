"""Optimizer steps of levels as compiled graphs."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nestor.autodiff.torch_private import foreach_copy_
from nestor.compilation.batch import Batches
from nestor.compilation.compiled_replay import CompiledReplay
from nestor.compilation.graph import Unsuitable
from nestor.compilation.graphs import Graphs, refilled
from nestor.compilation.tracer import Layout, Sender, Tracer
from nestor.errors import NestorError
from nestor.levels.gradient import Gradient
from nestor.levels.level import Draw, Level
from nestor.optim.rules import rule_of
from nestor.program import Program
from nestor.solvers import SolveState
from nestor.training.guard import Guard
from nestor.training.runner import Runner


class CompiledSteps:
    """Takes steps of levels, several ones at once, by graphs that are compiled when they are first needed.

    Args:
        program: The program.
        runners: What changes in each level, by name.
        guard: Told of steps whose numbers are checked later.

    Attributes:
        reasons: Why levels step eagerly, by name.
    """

    def __init__(self, program: Program, runners: Mapping[str, Runner], guard: Guard) -> None:
        self.program = program
        self.runners = runners
        self.guard = guard
        self.reasons: dict[str, str] = {}
        self._graphs = Graphs()
        self._groups: dict[tuple[str, ...], list[list[str]]] = {}
        self._read: dict[tuple[str, ...], list[str]] = {}
        self._rates: dict[tuple[str, int], tuple[float, Tensor]] = {}
        self._batches = Batches()
        self._cycles: dict[tuple[str, ...], bool] = {}
        self._waits = False
        self._hyperparameters = {name: _names(runner) for name, runner in runners.items()}
        for name, runner in runners.items():
            reason = _unsuitable(runner)
            if reason is not None:
                self._refuse([name], reason)

    def groups(self, due: Sequence[str]) -> list[list[str]]:
        """Cut the levels that are about to step into groups that are taken at once."""
        known = self._groups.get(tuple(due))
        if known is not None:
            return known
        groups: list[list[str]] = []
        open_ended = False
        for name in due:
            alone = not self._together(name)
            if open_ended and not alone:
                groups[-1].append(name)
            else:
                groups.append([name])
            open_ended = not alone
        if all(self.runners[name].steps > 0 for name in due):
            self._groups[tuple(due)] = groups
        return groups

    def _together(self, name: str) -> bool:
        """Whether the level's step may be in one graph with that of another level."""
        return self.runners[name].recorder is None and self._is_graph(name)

    def _is_graph(self, name: str) -> bool:
        """Whether the level's step is a graph."""
        runner = self.runners[name]
        # The first step makes the optimizer's state. A response that looks back over the run is no graph.
        below = self.program.below(name)[:-1]
        return name not in self.reasons and runner.steps > 0 and all(self.runners[b].recorder is None for b in below)

    def wait(self, waits: bool) -> None:
        """Say whether steps are taken eagerly, until all steps of a cycle are taken at once."""
        if waits != self._waits:
            self._waits = waits
            for level in self.program.levels.values():
                if isinstance(level.graphs, CompiledReplay):
                    level.graphs.waits = waits

    def is_cycle(self, names: Sequence[str]) -> bool:
        """Whether all steps up to one of a level with lowers, that one included, may be one graph."""
        together = tuple(names)
        if together not in self._cycles:
            self._cycles[together] = bool(names) and self._is_cycle(together)
        return self._cycles[together]

    def _is_cycle(self, names: Sequence[str]) -> bool:
        for name in names:
            level = self.runners[name].level
            if name in self.reasons:
                return False
            if self.runners[name].recorder is not None and (level.lowers or not set(level.uppers).intersection(names)):
                return False  # its steps are looked back on later
            if level.problem.scheduler is not None and names.count(name) > 1:
                return False  # the learning rate of the second step is not known
        return all(self.runners[read].recorder is None for read in self._reads(names) if read not in names)

    def is_begun(self, names: Sequence[str]) -> bool:
        """Whether the cycle begins here: no step that is looked back on was taken before."""
        return all(self.runners[name].recorder is None or self.runners[name].fresh for name in names)

    def take_cycle(self, names: Sequence[str], draws: Mapping[str, Sequence[tuple[Draw, ...]]], step: int) -> bool:
        """Take all steps of a cycle by one graph; see :meth:`is_cycle`.

        Args:
            names: The levels, in the order in which they step.
            draws: For each of them, the batches of its steps.
            step: The number of the last engine step, for errors.

        Returns:
            Whether they were taken. If not, nothing has changed.
        """
        try:
            return self._take(names, draws, step)
        except Unsuitable:
            # What steps by itself may be a graph all the same, and says if it is none.
            self._cycles[tuple(names)] = False
            return False

    def take(self, names: Sequence[str], step: int) -> bool:
        """Take the steps of some levels on their present draws.

        Args:
            names: The levels.
            step: The number of the engine step, for errors.

        Returns:
            Whether they were taken. If not, nothing has changed; a step without a graph says what is wrong.
        """
        if self._waits:
            return False
        if not self._is_graph(names[0]):  # the others of a group are
            return self._take_in_parts(names[0], step) if len(names) == 1 else False
        for name in names:
            self.runners[name].note_for_graph()
        taken = False
        try:
            taken = self._take(names, {name: [self.runners[name].draws] for name in names}, step)
        except Unsuitable as error:
            self._refuse(names, str(error))
        finally:
            if not taken:
                for name in names:
                    self.runners[name].forget_last()
        return taken

    def _take(self, names: Sequence[str], own: Mapping[str, Sequence[tuple[Draw, ...]]], step: int) -> bool:
        draws = {read: own.get(read) or [self.runners[read].draws] for read in self._reads(names)}
        key, arguments = self._gather(names, draws)
        graph = self._graphs.get(key, arguments, Tracer(self.program, self.runners, names, draws).write)
        with torch.no_grad():
            found = graph(arguments)
            holds = found[-1]
            if holds.device.type == "cpu" and not bool(holds):
                return False
            self._accept(list(dict.fromkeys(names)), graph.layout, iter(found), holds, step)
        return True

    def _reads(self, names: Sequence[str]) -> list[str]:
        """Name the levels that are evaluated when some levels step."""
        together = tuple(names)
        if together not in self._read:
            self._read[together] = list(dict.fromkeys(read for name in names for read in self.program.below(name)))
        return self._read[together]

    def _take_in_parts(self, name: str, step: int) -> bool:
        """Take a step whose responses look back over the run: what is before and after them are graphs."""
        runner = self.runners[name]
        level = runner.level
        if name in self.reasons or not runner.steps or runner.recorder is not None or _device(level) != "cpu":
            return False
        moments = {below: self.runners[below].moment() for below in self.program.below(name)}
        responses = self.program.reach(level, moments, runner.solves)
        lowers = [response.follower.level for response in responses if response.follower.level.name in level.reads]
        if any(response.values is not response.follower.level.parameters for response in responses):
            return False
        try:
            arguments: list[Tensor] = [p for other in self.program.levels.values() for p in other.parameters]
            key: list[Hashable] = ["send", name]
            for place, draw in enumerate(runner.draws):
                tensors, kind = self._batches.flatten((name, place), draw.batch)
                key.append(kind)
                arguments.extend(tensors)
            sender = Sender(self.program, runner.draws, name, [lower.name for lower in lowers])
            graph = self._graphs.get(tuple(key), arguments, sender.write)
            with torch.no_grad():
                found = graph(arguments)
            if not bool(found[-1]):
                return False
            results = iter(found)
            loss, metrics = next(results), {metric: next(results) for metric in graph.layout[0]}
            total = iter([next(results) if there else None for there in graph.layout[1]])
            own = [next(total) for _ in level.parameters]
            cotangents = {lower.name: [next(total) for _ in lower.parameters] for lower in lowers}
            gradient = self.program.pull_back(level, responses, own, cotangents)
            there = [value is not None for value in gradient]
            draws = {read: [self.runners[read].draws] for read in self._reads([name])}
            kinds, arguments = self._gather([name], draws)
            arguments += [*(value for value in gradient if value is not None), loss]
            write = Tracer(self.program, self.runners, [name], draws, there).write
            graph = self._graphs.get(("given", *there, kinds), arguments, write)
        except Unsuitable as error:
            self._refuse([name], str(error))
            return False
        except NestorError:
            return False
        with torch.no_grad():
            found = graph(arguments)
            if not bool(found[-1]):
                return False
            self._accept([name], graph.layout, iter(found), found[-1], step)
        assert runner.gradient is not None
        runner.gradient = runner.gradient._replace(metrics=metrics)
        return True

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        self.reasons.update(dict.fromkeys(names, reason))
        self._groups.clear()
        self._cycles.clear()
        levels = " and ".join(map(repr, names))
        warnings.warn(f"Engine(compile=True): level {levels} steps eagerly, because {reason}.", stacklevel=2)

    def _gather(
        self, names: Sequence[str], draws: Mapping[str, Sequence[tuple[Draw, ...]]]
    ) -> tuple[Hashable, list[Tensor]]:
        """List the arguments of a graph in the order in which a :class:`Tracer` reads them, and what tells it apart."""
        arguments: list[Tensor] = []
        key: list[Hashable] = [tuple(names)]
        for level in self.program.levels.values():
            arguments.extend(level.parameters)
        for name in dict.fromkeys(names):
            runner = self.runners[name]
            for slot in runner.kept():
                for field, value in slot.items():
                    if isinstance(value, Tensor):
                        key.append(field)
                        arguments.append(value)
                    else:
                        key.append((field, value))
            optimizer = runner.level.problem.optimizer
            if optimizer is not None:
                fields, rated = self._hyperparameters[name]
                for index, group in enumerate(optimizer.param_groups):
                    key.extend([group[field] for field in fields])
                    if rated:
                        arguments.append(self._rate(name, index, group["lr"]))
        for name, steps in draws.items():
            for index, step in enumerate(steps):
                for place, draw in enumerate(step):
                    tensors, kind = self._batches.flatten((name, index, place), draw.batch)
                    key.append(kind)
                    arguments.extend(tensors)
        return tuple(key), arguments

    def _rate(self, name: str, index: int, value: float | Tensor) -> Tensor:
        """Return a learning rate as a tensor, since schedules change it."""
        if isinstance(value, Tensor):
            return value.detach()
        known = self._rates.get((name, index))
        if known is None or known[0] != value:
            known = self._rates[name, index] = (value, torch.tensor(value, dtype=torch.float64))
        return known[1]

    def _accept(self, names: Sequence[str], layout: Layout, found: Iterator[Tensor], holds: Tensor, step: int) -> None:
        """Take over the results of a graph."""
        for name in names:
            runner = self.runners[name]
            level = runner.level
            new = [next(found) for _ in level.parameters]
            if len(new) == 1:
                level.parameters[0].copy_(new[0])
            else:
                foreach_copy_(list(level.parameters), new)
            runner.keep(refilled(layout.slots[name], found))
            loss, norm = next(found), next(found)
            metrics = {key: next(found) for key in layout.metrics[name]}
            for lower, keys in layout.stats[name].items():
                runner.solves.setdefault(lower, SolveState()).stats = {key: next(found) for key in keys}
            runner.gradient = Gradient(loss, metrics, [], norm, {})
            if runner.first_norm is None:
                runner.first_norm = norm
            if holds.device.type != "cpu":
                self.guard.defer(holds, level, runner.gradient, step)
            if level.problem.scheduler is not None:
                level.problem.scheduler.step()


def _device(level: Level) -> str:
    return level.parameters[0].device.type


def _names(runner: Runner) -> tuple[list[str], bool]:
    """Name the hyperparameters that are constants of a graph, and whether the learning rate is an argument of it."""
    optimizer = runner.level.problem.optimizer
    if optimizer is None:
        return [], False
    rated = rule_of(optimizer, optimizer.param_groups) is not None
    apart = ("params", "lr") if rated else ("params",)
    return [field for field in optimizer.param_groups[0] if field not in apart], rated


def _unsuitable(runner: Runner) -> str | None:
    """Say why the level's step can be no graph, as far as that is known before it is written."""
    level = runner.level
    recording = runner.recorder.recording if runner.recorder is not None else None
    if runner.runtime.size > 1 or level.placements is not None:
        return "its steps are those of several processes"
    if level.precision is not None:
        return "its losses run in half precision"
    if level.all_buffers:
        return f"the modules that its loss reads have buffers ({level.all_buffers[0][0]}), which a graph does not move"
    if level.learned:
        return "hyperparameters of its optimizer are learned"
    if recording is not None and (recording.gradient or recording.inputs):
        return f"its response, {level.response.describe()}, keeps the gradients of the run"
    return None
