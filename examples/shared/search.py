"""The same search for every library: each candidate is trained, the validation part chooses."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from shared.experiment import Case


class Trained(NamedTuple):
    """What a training reached on the part that chooses, and on the part that is reported."""

    validation: float
    test: float


def tuned(case: Case, name: str, rates: Sequence[float], train: Callable[[float], Trained]) -> None:
    """Train once for each rate and report the test accuracy of the one with the best validation accuracy.

    Seconds and memory are those of all trainings.
    """
    with case.method(name) as method:
        found = {rate: train(rate) for rate in rates}
    best = max(found, key=lambda rate: found[rate].validation)
    method.report(accuracy=found[best].test, rate=best)
