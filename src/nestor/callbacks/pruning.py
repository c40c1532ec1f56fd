"""Pruning of the trials of a hyperparameter search with Optuna."""

import importlib
from types import ModuleType
from typing import Any

from nestor.errors.options import check_options, typed
from nestor.training.callback import Callback
from nestor.training.run import Run


class OptunaPruning(Callback):
    """Report a metric to a trial of Optuna, and end the run when the trial's pruner asks for it.

    The metric ``"level/name"`` of a level is reported every ``every`` engine steps, once the level has stepped. Any
    other name is a metric of the validation, reported at each validation. Values are reported with the engine step. A
    run that is resumed reports no step twice, and the metrics of several processes are averages that the first process
    reports: only it needs the trial.

    Args:
        trial: The ``optuna.Trial``; None in all processes but the first one.
        metric: A key of ``engine.validation``, such as ``"accuracy"``, or a metric of a level, such as ``"net/loss"``.
        every: Engine steps between two reports of a level's metric. Reading it waits for the device.

    Raises:
        ImportError: If optuna is not installed.
        ValueError: If ``every`` is not positive; in the run, if there is no such metric or no validation.
        optuna.TrialPruned: In the run, if the trial is pruned.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> def objective(trial):
        ...     net = nestor.Variable(torch.ones(2))
        ...     sgd = torch.optim.SGD(net.parameters(), lr=trial.suggest_float("lr", 0.01, 0.3))
        ...     program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        ...     pruning = nestor.callbacks.OptunaPruning(trial, "net/loss", every=2)
        ...     return nestor.Engine(program, callbacks=[pruning], seed=0).run(10)["net/loss"]
        >>> study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
        >>> study.optimize(objective, n_trials=3)
        >>> len(study.trials)
        3
    """

    @typed
    def __init__(self, trial: Any, metric: str, *, every: int = 100) -> None:
        self.trial, self.metric, self.every = trial, metric, every
        check_options(self, counts=["every"])
        self._optuna = _load()
        self._reported: set[int] = set()

    def is_due(self, engine: Run, step: int) -> bool:
        return self._level(engine) is not None and step % self.every == 0

    def on_start(self, engine: Run) -> None:
        if self._level(engine) is None and not engine.validate_every:
            raise ValueError(
                f"OptunaPruning({self.metric!r}) needs validations, but with Engine(validate_every=0) there are none "
                "during a run. Give validate=... and validate_every=..., or choose a metric of a level: "
                f"{', '.join(repr(f'{name}/loss') for name in engine.states)}."
            )
        if isinstance(self.trial, self._optuna.Trial):
            # What the run has reported after the checkpoint from which it is resumed.
            trials = self.trial.study.get_trials(deepcopy=False)
            self._reported = set(trials[self.trial.number].intermediate_values)

    def on_step(self, engine: Run) -> None:
        level = self._level(engine)
        if level is not None and engine.step % self.every == 0 and engine.states[level].metrics.gradient is not None:
            self._report(engine, engine.read_all_metrics())

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        if self._level(engine) is None:
            self._report(engine, metrics)

    def _level(self, engine: Run) -> str | None:
        """Return the level that the metric belongs to; None if it belongs to the validation."""
        level, slash, _ = self.metric.partition("/")
        return level if slash and level in engine.states else None

    def _report(self, engine: Run, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            known = ", ".join(map(repr, metrics)) or "none"
            raise ValueError(f"OptunaPruning: there is no metric {self.metric!r}. Known are: {known}.")
        value, step, prune = metrics[self.metric], engine.step, False
        if self.trial is not None and engine.runtime.rank == 0:
            if step not in self._reported:
                self.trial.report(value, step)
                self._reported.add(step)
            prune = bool(self.trial.should_prune())
        if engine.runtime.any(prune):
            raise self._optuna.TrialPruned(f"{self.metric} = {value:.6g} at engine step {step}.")


def _load() -> ModuleType:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        text = f"OptunaPruning needs optuna, which cannot be imported ({error}): pip install 'nestor[optuna]'"
        raise ImportError(text, name="optuna") from error
