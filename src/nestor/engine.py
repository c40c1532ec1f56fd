"""The engine: runs the schedule of a program and owns everything that changes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestor.autodiff.precision import check_precision
from nestor.autodiff.randomness import Seeded, mix, untouched
from nestor.distributed import Runtime, SingleDevice
from nestor.errors import NonFiniteError
from nestor.levels.level import Draw, Level
from nestor.program import Program
from nestor.responses import Response
from nestor.training import checkpoint_files
from nestor.training.callback import Callback
from nestor.training.checks import call_it, check_levels, validation_arguments
from nestor.training.guard import Guard
from nestor.training.module_state import check_module_state, load_module_state, module_state
from nestor.training.runner import VALIDATION, Runner
from nestor.training.schedule import Schedule
from nestor.training.snapshot import Snapshot
from nestor.training.stepper import Stepper
from nestor.vectors import algebra

if TYPE_CHECKING:
    from nestor.compilation import CompiledSteps

# Engine steps in one graph, at most: it takes longer to compile the longer it is.
LONGEST_CYCLE = 10


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
        precision: ``"bf16"`` or ``"fp16"``: losses run under autocast; parameters, gradients, solvers and differences
            stay in single precision. fp16 scales losses, through responses too, and skips (and counts, as
            ``level/skipped``) a step that overflows. A level's own ``Problem(precision=...)`` goes before.
        runtime: Where the tensors live: ``SingleDevice()`` (None), ``DataParallel()`` or ``FullySharded()``.
        compile: Compile the steps between two steps of a level with lowers into one graph (losses, derivatives,
            responses and optimizers of at most ten engine steps). If a callback, a validation or a learning-rate change
            falls in between, smaller graphs are used. Small dense models run five to ten times as fast, after a
            compilation of some seconds. Levels that cannot be compiled (dropout, buffers, a loss that reads values) or
            are faster uncompiled (convolutions on a CPU) run eagerly; a warning and ``eager_reasons`` say why. Results
            agree with the eager run up to rounding. Tensors that a loss reads from outside are inputs of the graph;
            other outside values are frozen at compile time.

    Attributes:
        step: Engine steps taken.
        first_step: The value of ``step`` when the present ``run`` began.
        last_step: The value of ``step`` at which the present ``run`` ends.
        is_resuming: True if the present ``run`` was called with ``resume=...``.
        states: What changes in each level, by level name.
        validation: The metrics of the last validation.

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
        runtime: Runtime | None = None,
        precision: str = "fp32",
        compile: bool = False,
    ) -> None:
        if not isinstance(validate_every, int) or validate_every < 0:
            raise ValueError(f"Engine(validate_every={validate_every!r}) must be an integer of at least 0.")
        if validate_every and validate is None:
            raise ValueError(f"Engine(validate_every={validate_every}) has nothing to call: give validate=...")
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"{callback!r} is not a nestor.callbacks.Callback{call_it(callback)}.")
        check_levels(program)
        self.runtime = SingleDevice() if runtime is None else runtime
        check_precision(precision)
        program = self.runtime.place(program)
        program = program.with_precisions({n: v.problem.precision or precision for n, v in program.levels.items()})
        if compile:
            # Late: torch's compiler is heavy.
            from nestor.compilation import with_graphs

            program = with_graphs(program)
        self.program = program
        self.callbacks = tuple(callbacks)
        self.rollback = rollback
        self.validate_every = validate_every
        self.seed = self.runtime.agree(int(torch.randint(2**62, ()).item()) if seed is None else seed)
        self.step = 0
        self.first_step = 0
        self.last_step = 0
        self.is_resuming = False
        self.validation: dict[str, float] = {}
        self.states = {name: Runner(level, self.seed, self.runtime) for name, level in program.levels.items()}
        # The levels that depend on a level.
        self._below = {name: [s for s in self.states.values() if name in s.level.uppers] for name in self.states}
        self._schedule = Schedule(self.states)
        self._validate = validate
        self._validated = validation_arguments(validate, program)
        self._guard = Guard()
        self._stepper = Stepper(program, self.states, self._guard)
        self._compiled: CompiledSteps | None = None
        if compile:
            if rollback:
                raise ValueError("Engine(compile=True, rollback=True): a look-ahead is not compiled. Choose one.")
            from nestor.compilation import CompiledSteps

            self._compiled = CompiledSteps(program, self.states, self._guard)

    @property
    def eager_reasons(self) -> dict[str, str]:
        """The levels that ``compile=True`` has not compiled, with the reason."""
        return dict(self._compiled.reasons) if self._compiled is not None else {}

    def run(self, steps: int, *, resume: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Take engine steps, on from where the last run ended.

        Args:
            steps: How many.
            resume: ``"latest"``: go on from the newest checkpoint of the engine's :class:`Checkpoint` callback, or
                start if there is none; or the folder of one checkpoint. ``steps`` then counts from where the
                interrupted run began, so that the same command line finishes what was begun.

        Returns:
            The last metrics of all levels, and those of the last validation, as numbers.

        Raises:
            ValueError: If ``steps`` is not a positive integer.
            NestorError: If a level cannot be stepped; its parameters are then as before its step.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"Engine.run(steps={steps!r}) must be a positive integer.")
        self.first_step = self.step
        self.is_resuming = resume is not None
        if resume is not None:
            self._resume(resume)
        self.last_step = self.first_step + steps
        error: BaseException | None = None
        try:
            with untouched(), torch.enable_grad():
                self.runtime.begin()
                self._notify("on_start")
                while self.step < self.last_step:
                    if not self._cycle():
                        self._engine_step()
                self._guard.check()
                if self._validate is not None and not (self.validate_every and self.step % self.validate_every == 0):
                    self._run_validation()
        except BaseException as caught:
            error = caught
            raise
        finally:
            for callback in self._active():
                callback.on_end(self, error)
            if error is None or isinstance(error, NonFiniteError):
                # All processes come here, or none: another error may be that of one alone, which must not wait.
                self.runtime.end()
        return {**self.read_metrics(), **{f"validation/{name}": value for name, value in self.validation.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Write everything that changes in a run, as nested lists and dicts of tensors and plain data.

        Modules, optimizers, schedulers, counters, positions in the data, recorded steps, kept solves, callbacks: with
        ``load_state_dict`` in an engine built in the same way, the run goes on bit for bit. The tensors are the live
        ones: copy or save them before the next step.
        """
        self._guard.check()
        with self.runtime.whole_modules():
            modules = [module_state(module) for module in self._modules()]
            if self.runtime.size > 1:
                # The modules may let go of their memory after this.
                modules = copy.deepcopy(modules)
        return {
            "step": self.step,
            "first_step": self.first_step,
            "seed": self.seed,
            "validation": dict(self.validation),
            "modules": modules,
            "states": {name: runner.state_dict(self.program.levels) for name, runner in self.states.items()},
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another run stood.

        Raises:
            ValueError: If the state is that of another program; nothing has changed then.
        """
        modules = self._modules()
        if list(state["states"]) != list(self.states) or len(state["modules"]) != len(modules):
            raise ValueError(
                f"The state is that of a program with the levels {list(state['states'])}, this one has "
                f"{list(self.states)}. Build the engine as it was built for the run that was saved."
            )
        for module, saved in zip(modules, state["modules"], strict=True):
            check_module_state(module, saved)
        with self.runtime.whole_modules():
            for module, saved in zip(modules, state["modules"], strict=True):
                load_module_state(module, saved)
        self.step, self.first_step, self.seed = state["step"], state["first_step"], state["seed"]
        self.validation = dict(state["validation"])
        with untouched():
            for name, runner in self.states.items():
                runner.reseed(self.seed)
                runner.load_state_dict(state["states"][name], self.program.levels)
        if len(state["callbacks"]) == len(self.callbacks):
            for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
                callback.load_state_dict(saved)

    def _modules(self) -> list[nn.Module]:
        """List the modules of the program, each once."""
        return list(dict.fromkeys(level.problem.module for level in self.program.levels.values()))

    def _resume(self, resume: str | os.PathLike[str]) -> None:
        folder: Path | None = Path(resume)
        if resume == "latest":
            savers = [callback for callback in self.callbacks if type(callback).latest is not Callback.latest]
            if not savers:
                raise ValueError(
                    'Engine.run(resume="latest") has no Checkpoint among the callbacks to find the newest checkpoint: '
                    "Engine(program, callbacks=[nestor.callbacks.Checkpoint(folder)])."
                )
            folder = savers[0].latest()
        if folder is not None:
            self.load_state_dict(checkpoint_files.load(folder))

    def keep_histories(self) -> None:
        self._stepper.keeps_histories = True

    def hypergradient(self, level: str, *, response: Response | None = None) -> list[Tensor]:
        program = self.program
        if response is not None:
            program = program.with_responses(dict.fromkeys(program.below(level)[:-1], response))
        histories = {name: state.moment() for name, state in self.states.items()}
        with torch.enable_grad():
            values = program.gradient(program.levels[level], histories, statistics=False).values
        return algebra.zeros_for_none(values, program.levels[level].parameters)

    def read_metrics(self) -> dict[str, float]:
        """Read the latest metrics of every level back to Python, as ``level/name``; this waits for the device.

        Raises:
            NonFiniteError: If a step since the last reading was not finite.
        """
        self._guard.check()
        return {
            f"{name}/{key}": value for name, runner in self.states.items() for key, value in runner.metrics().items()
        }

    def read_all_metrics(self) -> dict[str, float]:
        metrics = self.read_metrics()
        for callback in self.callbacks:
            metrics |= callback.metrics()
        return metrics

    def _engine_step(self) -> None:
        due = self._schedule.due()
        for names in [[name] for name in due] if self._compiled is None else self._compiled.groups(due):
            for name in names:
                self._prepare(self.states[name])
            if self._compiled is None or not self._compiled.take(names, self.step + 1):
                for name in names:
                    self._stepper.take(self.states[name], self.step + 1)
            for name in names:
                self._schedule.stepped(name)
                self._notify("on_level_step", name)
        if self.rollback:
            self._stepper.look_back(set(due), self.step + 1)
        self._end_step(self.step + 1)

    def _end_step(self, step: int) -> None:
        self.step = step
        if self.validate_every and self.step % self.validate_every == 0:
            self._run_validation()
        self._notify("on_step")

    def _cycle(self) -> bool:
        """Take the engine steps up to one of a level with lowers by one graph; say whether that was done."""
        compiled = self._compiled
        if compiled is None:
            return False
        coming = self._schedule.coming(LONGEST_CYCLE)
        names = [name for due in coming for name in due]
        last = self.step + len(coming)
        too_far = last - self.step > self.last_step - self.first_step
        if too_far or self._is_due_before(last) or not compiled.is_cycle(names):
            compiled.wait(False)
            return False
        # The first steps of a run, and its end, are too few to compile them by themselves; what is planned is a cycle
        # that was not taken, which is gone through to see why.
        planned = any(self.states[name].planned for name in names)
        waits = planned or last > self.last_step or any(self.states[name].steps == 0 for name in names)
        compiled.wait(waits)
        if waits or not compiled.is_begun(names):
            return False
        fresh = {name: self.states[name].fresh for name in names}
        draws: dict[str, list[tuple[Draw, ...]]] = {name: [] for name in names}
        taken = False
        try:
            for name in names:
                self._prepare(self.states[name])
                draws[name].append(self.states[name].draws)
            taken = compiled.take_cycle(names, draws, last)
        finally:
            if not taken:
                for name, was_fresh in fresh.items():
                    self.states[name].fresh = was_fresh
                    self.states[name].planned.extend(draws[name])
        if not taken:
            return False
        for name in names:
            self._schedule.stepped(name)
        for name in coming[-1]:
            self._notify("on_level_step", name)
        self._end_step(last)
        return True

    def _is_due_before(self, last: int) -> bool:
        """Return True if a callback or a validation is due after an engine step before the ``last``."""
        between = range(self.step + 1, last)
        if self._stepper.keeps_histories:
            return True
        if self.validate_every and any(step % self.validate_every == 0 for step in between):
            return True
        return any(callback.is_due(self, step) for callback in self.callbacks for step in between)

    def _prepare(self, runner: Runner) -> None:
        """Draw the batches of a step, after what has to be done before it."""
        level = runner.level
        for lower in self._below[level.name]:
            lower.upper_moves(level.name, level.parameters)
        if self.rollback and level.uppers and (runner.steps % level.problem.unroll_steps == 0):
            runner.snapshot = Snapshot.take(level, runner.slots)
        if runner.fresh:
            runner.begin(self._start(level))
        runner.draw()

    def _start(self, level: Level) -> Sequence[Tensor] | None:
        name = level.problem.init
        if name is None:
            return None
        there = self.program.levels[name].parameters
        return [there[place] for place in level.start]

    def _run_validation(self) -> None:
        assert self._validate is not None
        levels = self.program.levels
        modes = {m: m.training for level in levels.values() for m in level.problem.module.modules()}
        for module in modes:
            module.training = False
        try:
            Seeded(mix(self.seed, len(levels), VALIDATION, self.step)).begin()
            with torch.no_grad(), self.runtime.whole_modules():
                result = self._validate(**{name: levels[name].problem.module for name in self._validated})
        finally:
            for module, training in modes.items():
                module.training = training
        metrics = result if isinstance(result, Mapping) else {"value": result}
        numbers = {key: float(value) for key, value in metrics.items()}
        self.validation = dict(zip(numbers, self.runtime.mean(list(numbers.values())), strict=True))
        self._notify("on_validation", self.validation)

    def _active(self) -> list[Callback]:
        """What writes or draws does so once, in the first process."""
        return [callback for callback in self.callbacks if self.runtime.rank == 0 or not callback.only_first]

    def _notify(self, event: str, *details: Any) -> None:
        if not self.callbacks:
            return
        for callback in self._active():
            getattr(callback, event)(self, *details)
