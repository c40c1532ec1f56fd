"""The engine: runs the schedule of a program and owns the mutable state."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from nestor.autodiff.precision import check_precision
from nestor.checkpoints.folder import load_checkpoint
from nestor.checkpoints.forms import name_of
from nestor.compilation import CompiledLoop, make_loop
from nestor.data.draws import RUN
from nestor.data.run_generators import RunGenerators
from nestor.data.seeds import mix
from nestor.distributed import Runtime, SingleDevice
from nestor.errors.options import typed
from nestor.explain.display import as_html
from nestor.program import Program, evaluator_of, with_evaluator
from nestor.responses import Response
from nestor.training import observers
from nestor.training.beginning import begin
from nestor.training.callback import Callback
from nestor.training.checks import check_options_of_engine, check_program
from nestor.training.description import describe
from nestor.training.ending import RunProcess, Signals, check_steps, compare_runs, ending
from nestor.training.engine_state import VERSION, Identity, check_state, load_callbacks
from nestor.training.level_state import LevelState
from nestor.training.program_state import check_program_state, load_program_state, program_state_dict
from nestor.training.shared_program import compare_programs
from nestor.training.summary import level_table, summary
from nestor.training.validation import Validation


class Engine:
    """Runs a program.

    One engine step is one optimizer step of every level without lowers. After ``unroll_steps`` optimizer steps a level
    is ready, once past ``warmup_steps``; a level steps as soon as all its lowers are ready, on its own batch, with its
    total hypergradient. Levels step in the order listed. Modules keep their mode (train, eval) except in validations.

    Args:
        program: The program; every level needs an optimizer, and data if its loss takes a batch.
        callbacks: Observers, called at the start, after each step and validation, at the end; see :class:`Callback`.
        validate: ``validate(level, ...)`` receives the modules of the levels that it names, in eval mode and without
            gradients (of a level with tasks :meth:`Program.copies`), and returns a scalar or a mapping of scalars.
        validate_every: Engine steps between validations; 0 validates at the end of a run only.
        rollback: Lower steps are a look-ahead: after a level above has stepped, each of its lowers is reset to the
            start of its unroll and takes one step on its last batch, with the new variables of the level above.
        seed: Seeds shuffling, augmentation and dropout, a stream for each level, of the global generators of torch,
            numpy and Python's ``random``, whose states outside of the run stay; None draws a seed from torch's.
        precision: ``"bf16"`` or ``"fp16"``: losses run under autocast, all else in single precision. fp16 scales losses
            and skips steps that overflow (``level/skipped``). ``Problem(precision=...)`` has precedence.
        runtime: Where the tensors are: ``SingleDevice()`` (None), ``DataParallel()`` or ``FullySharded()``.
        compile: Compile the steps between two steps of a level with lowers into one graph (losses, derivatives,
            responses, optimizers; at most ten engine steps), or smaller ones if a callback, a validation or another
            learning rate falls in between. Small dense models run five to ten times as fast, after some seconds. Levels
            that cannot be compiled (dropout, a loss that reads values) or are faster uncompiled (convolutions on a CPU)
            run eagerly; a warning and ``eager_reasons`` say why. Results agree up to rounding. Tensors that a loss
            reads from outside are inputs of the graph; other outside values are frozen at compile time.
        check: Check at the first step of a level with lowers that the losses below are functions of their arguments,
            that responses contribute, that differences agree with exact derivatives, and that replays of ``Unrolled``
            equal the recorded steps. ``n`` repeats all but the comparison of differences every ``n`` steps.
        keep_last: Copy a level's variables and optimizer memory before each step, to restore them if the result is not
            finite. Without it they are lost, except on an accelerator and for update rules and tasks.

    Attributes:
        program: The program, with the variables that the runtime has placed on devices.
        runtime: The runtime.
        callbacks: The callbacks.
        seed: The seed of the run.
        step: Engine steps taken.
        first_step: The value of ``step`` when the current ``run`` began.
        last_step: The value of ``step`` at which the current ``run`` ends.
        is_resuming: True if the current ``run`` was called with ``resume=...``.

    Raises:
        ValueError: If a level lacks an optimizer or data, an argument is out of range, or a loader splits its data.
        TypeError: If a callback is no :class:`Callback`.

    Example:
        >>> x = nestor.Variable(torch.ones(2))
        >>> level = nestor.Problem(x, lambda x: x().square().sum(), optimizer=torch.optim.SGD(x.parameters(), lr=0.25))
        >>> nestor.Engine(nestor.Program(x=level), seed=0).run(3)["x/loss"]
        0.125
    """

    @typed
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
        check: bool | int = True,
        keep_last: bool = False,
    ) -> None:
        check_options_of_engine(callbacks, rollback=rollback, compile=compile, check=check)
        self.runtime = SingleDevice() if runtime is None else runtime
        check_program(evaluator_of(program), self.runtime)
        check_precision(precision)
        options = {"precision": precision, "rollback": rollback, "compile": compile}
        self._identity = Identity(uuid4().hex, describe(program.levels, program.nesting, callbacks, **options))
        options |= {"seed": seed, "validate_every": validate_every, "check": check}
        compare_programs(self.runtime, program.levels, program.nesting, callbacks, **options)
        evaluator = self.runtime.place(evaluator_of(program))
        evaluator = evaluator.with_precisions(
            {name: level.problem.precision or precision for name, level in evaluator.levels.items()}
        )
        self.callbacks = tuple(callbacks)
        self.seed = self.runtime.agree(int(torch.randint(2**62, ()).item()) if seed is None else seed)
        self.step, self.first_step, self.last_step, self.is_resuming = 0, 0, 0, False
        observed = partial(observers.is_observed, self, self.callbacks)
        self._loop = make_loop(
            evaluator, self.seed, self.runtime, observed, rollback=rollback, compile=compile, check=check
        )
        self._loop.guard.keeps_last = keep_last
        self._loop.guard.newest = partial(observers.newest_checkpoint, self.callbacks)
        self.program = with_evaluator(program, self._loop.stepper.evaluator)
        self._validation = Validation(validate, validate_every, program.levels, self.runtime)
        self._process = RunProcess(
            RunGenerators(mix(self.seed, len(program.levels), RUN, self.runtime.rank)),
            Signals(data for state in self.states.values() for data in state.draws.iterables()),
        )

    def __repr__(self) -> str:
        return summary(self, self.seed, self.callbacks, compiled=isinstance(self._loop, CompiledLoop))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return the texts from which a notebook chooses: a table of the levels and their last metrics, or lines."""
        return {"text/plain": repr(self), "text/html": as_html(level_table(self))}

    @property
    def states(self) -> Mapping[str, LevelState]:
        """The state of each level, by level name."""
        return self._loop.stepper.states

    @property
    def validation(self) -> dict[str, float]:
        """The metrics of the last validation."""
        return self._validation.latest

    @property
    def signal(self) -> int | None:
        """The number of the signal that ends the run after the present step; None if there is none."""
        return self._process.signals.agreed

    @property
    def validate_every(self) -> int:
        """Engine steps between two validations; 0 if there is none before the end of a run."""
        return self._validation.every

    @property
    def eager_reasons(self) -> dict[str, str]:
        """The levels that ``compile=True`` has not compiled, with the reason."""
        return dict(self._loop.eager_reasons)

    def run(self, steps: int, *, resume: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Take engine steps, starting where the last run ended.

        Args:
            steps: Number of engine steps.
            resume: ``"latest"``: continue from the newest checkpoint of the engine's :class:`Checkpoint` callback, or
                start if there is none; or the folder of one checkpoint. ``steps`` then counts from the start of the
                interrupted run, so that the same command finishes that run.

        Returns:
            The last metrics of all levels, and those of the last validation, as numbers.

        Raises:
            ValueError: If ``steps`` is not a positive integer.
            NestorError: If a level cannot be stepped; its parameters are then as before its step, unless the error is a
                NonFiniteError with names in ``lost``.
        """
        check_steps(steps)
        if self.last_step == 0:
            begin(evaluator_of(self.program))
        self.first_step, self.is_resuming = self.step, resume is not None
        with self._process.signals as signals:
            folder = None if resume is None else observers.checkpoint_of(resume, self.callbacks)
            compare_runs(self, steps, folder)
            if folder is not None:
                self._load(load_checkpoint(folder))
            self.last_step = self.first_step + int(steps)
            with ending(self, signals, self.callbacks):
                self._run(signals)
        return {**self.read_metrics(), **{f"validation/{name}": value for name, value in self.validation.items()}}

    def _run(self, signals: Signals) -> None:
        stepped, next_due = partial(self._notify, "on_level_step"), partial(observers.next_due, self, self.callbacks)
        with self._process.generators.active(), torch.enable_grad():
            if self.runtime.holds_variables:
                self.runtime.begin()
            self._notify("on_start")
            signals.agree(self)
            signals.end_run()
            while self.step < self.last_step:
                self.step = self._loop.advance(self, next_due, stepped)
                if observers.validates_after(self, self.step):
                    self._validate()
                signals.agree(self)
                self._notify("on_step")
                signals.end_run()
            self._check()
            if self._validation.validate is not None and not observers.validates_after(self, self.step):
                self._validate()
            signals.agree(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run, as nested lists and dicts of tensors and plain data.

        It contains modules, optimizers, schedulers, counters, positions in the data, histories, solves and callbacks.
        After ``load_state_dict`` in an engine built in the same way, the run continues bitwise. The tensors are not
        copies: copy or save them before the next step.

        Raises:
            NonFiniteError: If a variable, an optimizer's memory or a buffer has become not finite.
        """
        self._check()
        self._loop.guard.check_state(self.states, self.runtime)
        return {
            "version": VERSION,
            "run": self._identity.run,
            "program": self._identity.program,
            "step": self.step,
            "first_step": self.first_step,
            "seed": self.seed,
            "validation": dict(self.validation),
            **program_state_dict(self.program.levels, self.states, self.runtime),
            "generators": self._process.generators.state_dict(),
            "callbacks": [[name_of(type(callback)), callback.state_dict()] for callback in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that ``state_dict`` has returned, or :func:`nestor.load_checkpoint`. The state is copied.

        The program is compared first. Levels, variables, optimizers, schedulers, responses and ``unroll_steps`` must
        be the same. Other differences issue one warning that lists them: hyperparameters, data, callbacks, precision.

        Raises:
            CheckpointError: If the state belongs to another program, is of another version, or the data of a level
                cannot go back; nothing has changed then.
        """
        self._load(copy.deepcopy(dict(state)))

    def _load(self, state: dict[str, Any]) -> None:
        """Load a state whose tensors the engine may keep."""
        check_state(state, self._identity)
        check_program_state(state, self.states)
        with self._process.signals.workers:
            load_program_state(state, self.program.levels, self.states, self.runtime, state["seed"])
        self.step, self.first_step, self.seed = state["step"], state["first_step"], state["seed"]
        self._identity = Identity(state["run"], state["program"])
        self._validation.latest = dict(state["validation"])
        self._process.generators.load_state_dict(state["generators"])
        load_callbacks(self.callbacks, state["callbacks"])

    def keep_histories(self) -> None:
        """Keep the step histories of the levels after the steps of the levels above; see :class:`Run`."""
        self._loop.stepper.keeps_histories = True

    def hypergradient(self, level: str, *, response: Response | None = None) -> list[Tensor]:
        """Evaluate the hypergradient of a level at the current point, on the last batches; see :class:`Run`."""
        return self._loop.stepper.hypergradient(level, response)

    def read_metrics(self) -> dict[str, float]:
        """Read the latest metrics of every level as numbers, as ``level/name``; this waits for the device.

        Raises:
            NonFiniteError: If a step since the last reading was not finite.
        """
        self._check()
        return {
            f"{name}/{key}": value for name, state in self.states.items() for key, value in state.read_metrics().items()
        }

    def read_all_metrics(self) -> dict[str, float]:
        return self.read_metrics() | {k: v for callback in self.callbacks for k, v in callback.metrics().items()}

    def _check(self) -> None:
        """Raise the error of a step that was not finite, if it has not been raised yet."""
        if self._loop.guard.pending:
            self._loop.guard.check()

    def _validate(self) -> None:
        self._notify("before_validation")
        self._notify("on_validation", self._validation.run(self.seed, self.step))

    def _notify(self, event: str, *details: Any) -> None:
        observers.notify(self, self.callbacks, event, *details)
