"""OptunaPruning, with the real Optuna."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nestor
from nestor.callbacks import Callback, Checkpoint, OptunaPruning

optuna = pytest.importorskip("optuna")
Make = Callable[..., nestor.Engine]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class Below(optuna.pruners.BasePruner):
    """Prunes when the last value is above a limit."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def prune(self, study: Any, trial: Any) -> bool:
        return trial.last_step is not None and trial.intermediate_values[trial.last_step] > self.limit


def study(limit: float) -> Any:
    return optuna.create_study(pruner=Below(limit))


@pytest.mark.parametrize("limit", [3.5, 100.0])
def test_prunes_at_a_validation(make: Make, limit: float) -> None:
    """At the first validation that the pruner rejects; the values are reported at their engine steps."""
    ended: list[Any] = []

    class Sees(Callback):
        def on_end(self, engine: Any, error: BaseException | None) -> None:
            ended.append((engine.step, type(error)))

    def objective(trial: Any) -> float:
        scores = iter(range(1, 10))
        engine = make(
            callbacks=[OptunaPruning(trial, "score"), Sees()],
            validate=lambda: {"score": float(next(scores))},
            validate_every=2,
        )
        return engine.run(12)["validation/score"]

    search = study(limit)
    search.optimize(objective, n_trials=1)
    [trial] = search.trials
    if limit < 10:
        assert trial.state == optuna.trial.TrialState.PRUNED
        assert trial.intermediate_values == {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
        assert ended == [(8, optuna.TrialPruned)]
    else:
        assert trial.state == optuna.trial.TrialState.COMPLETE
        assert trial.value == 6.0
        assert list(trial.intermediate_values) == [2, 4, 6, 8, 10, 12]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning:torch")
def test_metric_of_a_level(make: Make) -> None:
    """Every ``every`` engine steps; a compiled run stops there too."""
    for compile in (False, True):
        search = study(1e9)
        search.optimize(
            lambda trial, c=compile: make(callbacks=[OptunaPruning(trial, "net/loss", every=3)], compile=c).run(9)[
                "net/loss"
            ],
            n_trials=1,
        )
        [trial] = search.trials
        assert list(trial.intermediate_values) == [3, 6, 9]
        assert trial.intermediate_values[9] == trial.value


def test_a_resumed_run_reports_no_step_twice(make: Make, tmp_path: Path) -> None:
    """Also not those after the checkpoint: Optuna would warn, and warnings are errors here."""
    search = study(1e9)
    trial = search.ask()

    class Killed(Callback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step(self, engine: Any) -> None:
            if engine.step == self.step:
                raise KeyboardInterrupt

    def run(until: int) -> dict[str, float]:
        engine = make(
            callbacks=[OptunaPruning(trial, "score"), Checkpoint(tmp_path, every=4), Killed(until)],
            validate=lambda net: {"score": float(net.weight.detach().norm())},
            validate_every=2,
        )
        return engine.run(10, resume="latest")

    with pytest.raises(KeyboardInterrupt):
        run(7)
    before = dict(search.trials[0].intermediate_values)
    assert list(before) == [2, 4, 6]
    metrics = run(100)
    after = search.trials[0].intermediate_values
    assert list(after) == [2, 4, 6, 8, 10]
    assert all(after[step] == before[step] for step in before)
    search.tell(trial, metrics["validation/score"])


def test_what_is_refused(make: Make) -> None:
    trial = optuna.trial.FixedTrial({})
    with pytest.raises(ValueError, match=r"OptunaPruning\('score'\) needs validations.*'net/loss', 'lam/loss'"):
        make(callbacks=[OptunaPruning(trial, "score")]).run(1)
    with pytest.raises(ValueError, match=r"there is no metric 'scores'\. Known are: 'score'"):
        make(callbacks=[OptunaPruning(trial, "scores")], validate=lambda: {"score": 1.0}, validate_every=1).run(1)
    with pytest.raises(ValueError, match="every"):
        OptunaPruning(trial, "net/loss", every=0)
    make(callbacks=[OptunaPruning(trial, "score")], validate=lambda: {"score": 1.0}, validate_every=1).run(2)
