"""EarlyStopping: after how many looks, at which metric, and what happens next."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

import nestor
from nestor.callbacks import BestWeights, EarlyStopping

Make = Callable[..., nestor.Engine]


def scripted(values: Iterable[float]) -> Callable[[], dict[str, float]]:
    """A validation that returns these values one after another."""
    rest = iter(values)
    return lambda: {"score": next(rest), "other": 0.0}


@pytest.mark.parametrize(
    ("values", "options", "stop", "best", "best_step"),
    [
        ([3, 2, 2, 2, 1], {"patience": 2}, 4, 2, 2),
        ([3, 2, 2, 2, 1], {"patience": 3}, 5, 1, 5),
        ([1, 2, 3, 2, 3], {"mode": "max", "patience": 2}, 5, 3, 3),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 3, "min_delta": 0.25}, 5, 2.7, 4),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 2, "min_delta": 0.5}, 3, 3, 1),
        ([float("nan"), 2, float("nan"), float("inf"), 1], {"patience": 2}, 4, 2, 2),
    ],
)
def test_validations(
    make: Make, values: list[float], options: dict[str, Any], stop: int, best: float, best_step: int
) -> None:
    """By hand: the step it ends at, the best value and where that was."""
    watcher = EarlyStopping("score", **options)
    engine = make(callbacks=[watcher], validate=scripted([*values, 0, 0]), validate_every=1)
    engine.run(5)
    assert (engine.step, watcher.best, watcher.best_step) == (stop, best, best_step)
    assert watcher.stopped_at == (stop if stop < 5 else None)


def test_metric_of_a_level(make: Make) -> None:
    """Read every so many steps, and only once the level has stepped."""
    watcher = EarlyStopping("lam/loss", min_delta=1e9, patience=2, every=3)
    engine = make(callbacks=[watcher])
    engine.run(100)
    assert (engine.step, watcher.best_step) == (9, 3)
    assert watcher.stopped_at == 9
    # Further runs have new patience.
    engine.run(100)
    assert engine.step == 15


def test_unknown_metrics(make: Make) -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match=r"no metric 'net/accuracy'. Known are: 'net/loss', 'net/gradient_norm'"):
        make(callbacks=[EarlyStopping("net/accuracy", "max")]).run(3)
    with pytest.raises(ValueError, match=r"no metric 'acc'. Known are: 'score', 'other'"):
        make(callbacks=[EarlyStopping("acc", "max")], validate=scripted([1]), validate_every=1).run(1)
    with pytest.raises(ValueError, match=r"there are none during a run.*'net/loss', 'lam/loss'"):
        make(callbacks=[EarlyStopping("acc", "max")], validate=scripted([1])).run(1)


@pytest.mark.parametrize("options", [{"mode": "up"}, {"patience": 0}, {"min_delta": -1.0}, {"every": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    """At construction, with the value."""
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        EarlyStopping("score", **options)


@pytest.mark.parametrize("callback", [EarlyStopping, BestWeights])
@pytest.mark.parametrize("metric", ["accuracy", "net/Top-1 accuracy", "val_f1"])
def test_large_values_that_are_good(callback: type[EarlyStopping] | type[BestWeights], metric: str) -> None:
    """Without a mode a name that says so is refused, with both ways to write it; no other name is."""
    with pytest.raises(ValueError, match=rf"{callback.__name__}\('{metric}'\) would.*'{metric}', mode='max'\)"):
        callback(metric)
    assert (callback(metric, "max").mode, callback(metric, "min").mode) == ("max", "min")
    assert callback("accrual/loss").mode == "min"
