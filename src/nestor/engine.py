"""The engine: runs the schedule of a program and owns everything that changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS

from nestor.batches import Stream, move
from nestor.callbacks.callback import Callback
from nestor.errors import NestorError
from nestor.graph import location
from nestor.guard import Guard
from nestor.level import Draw, Level
from nestor.program import Gradient, Program
from nestor.randomness import Seeded, mix, untouched
from nestor.rollback import Snapshot

# Streams of random numbers that a level draws from.
_DATA, _LOSS, _VALIDATION = range(3)


class Runner:
    """What changes in one level while a program runs.

    Attributes:
        level: The level.
        steps: Optimizer steps taken, those of a look-ahead included.
        drawn: Batches drawn.
        draws: The batches of the last optimizer step.
        gradient: The gradient of the last optimizer step; None before the first one.
    """

    def __init__(self, level: Level, seed: int) -> None:
        self.level = level
        self.seed = seed
        self.steps = 0
        self.drawn = 0
        self.draws: tuple[Draw, ...] = ()
        self.gradient: Gradient | None = None
        self.ready: set[str] = set()
        self.snapshot: Snapshot | None = None
        data = level.problem.data
        self._stream = Stream(data, level.name) if data is not None and level.takes_batch else None
        self._device = level.parameters[0].device

    @property
    def epoch(self) -> int:
        """How often the data was started again."""
        return max(self._stream.epoch, 0) if self._stream else 0

    def draw(self) -> None:
        """Draw the batches of the next optimizer step."""
        self.draws = tuple(self._draw() for _ in range(self.level.problem.accumulate))

    def _draw(self) -> Draw:
        batch = None
        if self._stream is not None:
            # Loaders shuffle and datasets augment with the global generators: each level has its own numbers, so
            # the order of its data does not depend on what other levels draw.
            Seeded(mix(self.seed, self.level.index, _DATA, self.drawn)).begin()
            batch = self._stream.draw()
            if self._device.type != "cpu":
                batch = move(batch, self._device)
        randomness = Seeded(mix(self.seed, self.level.index, _LOSS, self.drawn))
        self.drawn += 1
        return Draw(batch, randomness)

    @property
    def cycle_ends(self) -> bool:
        """Whether the last step completed ``unroll_steps``."""
        return self.steps % self.level.problem.unroll_steps == 0

    @property
    def warm(self) -> bool:
        """Whether the levels above may step."""
        return self.steps > self.level.problem.warmup_steps


class Engine:
    """Runs a program.

    One engine step is one optimizer step of every level without lowers. After ``unroll_steps`` optimizer steps a level
    is ready, once past ``warmup_steps``; a level steps as soon as all its lowers are ready, on its own batch, with its
    total hypergradient. Levels step in the order listed.

    Args:
        program: The program; every level needs an optimizer, and data if its loss takes a batch.
        callbacks: Called at the start, after each step of a level, after each engine step, after a validation and at
            the end; see :class:`Callback`.
        validate: ``validate(level, ...)``: its arguments are names of levels and receive their modules, in eval mode
            and without gradients. Returns a mapping of scalars, or one scalar.
        validate_every: Engine steps between validations; 0 validates at the end of a run only.
        rollback: Lower steps are a look-ahead: after a level above has stepped, each of its lowers goes back to the
            start of its unroll and takes one step, on its last batch, with the new upper.
        seed: Seeds shuffling, augmentation and dropout of every level, each its own stream; None draws a seed from
            torch's global generator.

    Attributes:
        step: Engine steps taken.
        target: Engine steps at which the present ``run`` ends.
        runners: What changes, by level name.
        validation: The last validation's metrics.

    Raises:
        ValueError: If a level lacks an optimizer or data, or an argument is out of range.
        TypeError: If a callback is none.
    """

    def __init__(
        self,
        program: Program,
        *,
        callbacks: Sequence[Callback] = (),
        validate: Callable[..., Any] | None = None,
        validate_every: int = 0,
        rollback: bool = False,
        seed: int | None = None,
    ) -> None:
        if not isinstance(validate_every, int) or validate_every < 0:
            raise ValueError(f"Engine(validate_every={validate_every!r}) must be an integer of at least 0.")
        if validate_every and validate is None:
            raise ValueError(f"Engine(validate_every={validate_every}) has nothing to call: give validate=...")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"{callback!r} is not a nestor.callbacks.Callback{_call_it(callback)}.")
        _check_levels(program)
        self.program = program
        self.callbacks = tuple(callbacks)
        self.rollback = rollback
        self.validate_every = validate_every
        self.seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        self.step = 0
        self.target = 0
        self.validation: dict[str, float] = {}
        self.runners = {name: Runner(level, self.seed) for name, level in program.levels.items()}
        self._validate = validate
        self._validated = _validation_arguments(validate, program)
        self._guard = Guard()

    def run(self, steps: int) -> dict[str, float]:
        """Take engine steps, on from where the last run ended.

        Args:
            steps: How many.

        Returns:
            The last metrics of all levels, and those of the last validation, as numbers.

        Raises:
            ValueError: If ``steps`` is not a positive integer.
            NestorError: If a level cannot be stepped; its parameters are then as before its step.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"Engine.run(steps={steps!r}) must be a positive integer.")
        self.target = self.step + steps
        error: BaseException | None = None
        try:
            with untouched():
                self._notify("on_start")
                while self.step < self.target:
                    self._engine_step()
                self._guard.check()
                if self._validate is not None and not (self.validate_every and self.step % self.validate_every == 0):
                    self._run_validation()
        except BaseException as caught:
            error = caught
            raise
        finally:
            for callback in self.callbacks:
                callback.on_end(self, error)
        return {**self.read_metrics(), **{f"validation/{name}": value for name, value in self.validation.items()}}

    def read_metrics(self) -> dict[str, float]:
        """Read the latest metrics of every level back to Python, as ``level/name``; this waits for the device.

        Raises:
            NonFiniteError: If a step since the last look was not finite.
        """
        self._guard.check()
        metrics = {}
        for name, runner in self.runners.items():
            if runner.gradient is not None:
                metrics[f"{name}/loss"] = runner.gradient.loss.item()
                metrics[f"{name}/gradient_norm"] = runner.gradient.norm.item()
                for key, value in runner.gradient.metrics.items():
                    metrics[f"{name}/{key}"] = value.item() if isinstance(value, Tensor) else float(value)
        return metrics

    def _engine_step(self) -> None:
        stepped: set[str] = set()
        for name, runner in self.runners.items():
            level = runner.level
            if level.lowers:
                if not runner.ready.issuperset(level.lowers):
                    continue
                runner.ready.clear()
            if self.rollback and level.uppers and (runner.steps % level.problem.unroll_steps == 0):
                runner.snapshot = Snapshot.take(level)
            runner.draw()
            self._optimize(runner)
            runner.steps += 1
            stepped.add(name)
            self._notify("on_level_step", name)
            if runner.cycle_ends and runner.warm:
                for other in self.runners.values():
                    if name in other.level.lowers:
                        other.ready.add(name)
        if self.rollback:
            self._roll_back(stepped)
        self.step += 1
        if self.validate_every and self.step % self.validate_every == 0:
            self._run_validation()
        self._notify("on_step")

    def _roll_back(self, stepped: set[str]) -> None:
        below = {lower for name in stepped for lower in self.program.levels[name].lowers}
        returning = [r for name, r in self.runners.items() if name in below and r.snapshot is not None]
        for runner in returning:
            assert runner.snapshot is not None
            runner.snapshot.restore(runner.level)
        for runner in returning:
            self._optimize(runner)
            runner.snapshot = None

    def _optimize(self, runner: Runner) -> None:
        """Take one optimizer step on the runner's present draws."""
        level, problem = runner.level, runner.level.problem
        assert problem.optimizer is not None
        buffers = level.own_buffers()
        draws = {name: other.draws for name, other in self.runners.items()}
        try:
            gradient = self.program.gradient(level, draws)
            values = gradient.values
            if problem.clip_norm is not None:
                # The small number is that of torch.nn.utils.clip_grad_norm_, so that both clip alike.
                factor = torch.clamp(problem.clip_norm / (gradient.norm + 1e-6), max=1.0)
                values = [None if v is None else v * factor for v in values]
            with _grads(level.parameters, values):
                self._guard.step(problem.optimizer, level, gradient, self.step + 1)
        except NestorError as error:
            for buffer, before in buffers:
                with torch.no_grad():
                    buffer.copy_(before)
            raise error.located(level=level.name, where=level.where, step=self.step + 1) from None
        if problem.scheduler is not None:
            problem.scheduler.step()
        runner.gradient = Gradient(gradient.loss, gradient.metrics, [], gradient.norm, gradient.cotangents)

    def _run_validation(self) -> None:
        assert self._validate is not None
        levels = self.program.levels
        modes = {m: m.training for level in levels.values() for m in level.problem.module.modules()}
        for module in modes:
            module.training = False
        try:
            Seeded(mix(self.seed, len(levels), _VALIDATION, self.step)).begin()
            with torch.no_grad():
                result = self._validate(**{name: levels[name].problem.module for name in self._validated})
        finally:
            for module, training in modes.items():
                module.training = training
        metrics = result if isinstance(result, Mapping) else {"value": result}
        self.validation = {
            key: value.item() if isinstance(value, Tensor) else float(value) for key, value in metrics.items()
        }
        self._notify("on_validation", self.validation)

    def _notify(self, event: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)


@contextmanager
def _grads(parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> Iterator[None]:
    """Lend the gradients to ``.grad``, where torch's optimizers read them."""
    before = [p.grad for p in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.grad = value


def _check_levels(program: Program) -> None:
    owner: dict[int, str] = {}
    for name, level in program.levels.items():
        problem = level.problem
        if problem.optimizer is None:
            raise ValueError(
                f"Level {name!r} has no optimizer, so the engine cannot step it: "
                "Problem(..., optimizer=torch.optim.Adam(module.parameters()))."
            )
        if isinstance(problem.optimizer, LBFGS):
            raise ValueError(f"Level {name!r}: LBFGS calls the loss itself and cannot be stepped; take SGD or Adam.")
        if owner.setdefault(id(problem.optimizer), name) != name:
            raise ValueError(
                f"Levels {owner[id(problem.optimizer)]!r} and {name!r} share one optimizer; give each its own."
            )
        if problem.scheduler is not None and problem.scheduler.optimizer is not problem.optimizer:
            raise ValueError(f"Level {name!r}: its scheduler changes another optimizer than its own.")
        if level.takes_batch and problem.data is None:
            raise ValueError(
                f"Level {name!r}, loss {level.where}: its loss takes a batch, but the level has no data: "
                "Problem(..., data=loader)."
            )


def _validation_arguments(validate: Callable[..., Any] | None, program: Program) -> tuple[str, ...]:
    if validate is None:
        return ()
    names = []
    for name, parameter in inspect.signature(validate).parameters.items():
        if name in program.levels:
            names.append(name)
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"validate {location(validate)} has the argument {name!r}, which is the name of no level "
                f"({', '.join(map(repr, program.levels))}). Bind it beforehand with functools.partial."
            )
    return tuple(names)


def _call_it(callback: object) -> str:
    return f"; write {callback.__name__}()" if isinstance(callback, type) else ""
