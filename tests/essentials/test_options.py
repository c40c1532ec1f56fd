"""Options out of range are refused when a method is made, with its name, the option and the value."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import nestor
from nestor import GMRES, MINRES, ConjugateGradient, FiniteDifference, Problem, Variable
from nestor.callbacks import Checkpoint, CSVLog, EarlyStopping
from nestor.distributed.data_parallel import Distributed


def problem(**options: Any) -> Problem:
    return Problem(Variable(torch.zeros(2)), lambda: torch.zeros(()), **options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: ConjugateGradient(max_steps=2.5),
            r"ConjugateGradient\(max_steps=2.5\) must be an integer of at least 1",
        ),
        (lambda: MINRES(max_steps=True), r"MINRES\(max_steps=True\) must be an integer"),
        (lambda: GMRES(restart=0), r"GMRES\(restart=0\) must be an integer of at least 1"),
        (lambda: GMRES(rtol=-1.0), r"GMRES\(rtol=-1.0\) must be a finite number >= 0"),
        (lambda: FiniteDifference(rel_step=float("nan")), r"rel_step=nan\) must be positive and finite"),
        (lambda: nestor.EvolutionStrategies(samples=0), r"EvolutionStrategies\(samples=0\) must be an integer"),
        (lambda: problem(tasks=0), r"Problem\(tasks=0\) must be an integer of at least 1"),
        (lambda: problem(clip_norm=0.0), r"Problem\(clip_norm=0.0\) must be positive and finite"),
        (lambda: problem(warmup_steps=-1), r"Problem\(warmup_steps=-1\) must be an integer of at least 0"),
        (lambda: CSVLog("x.csv", every=0), r"CSVLog\(every=0\) must be an integer"),
        (lambda: Checkpoint("x", keep=0), r"Checkpoint\(keep=0\) must be an integer"),
        (
            lambda: EarlyStopping("loss", min_delta=float("inf")),
            r"EarlyStopping\(min_delta=inf\) must be a finite number",
        ),
    ],
)
def test_out_of_range(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_integers_of_numpy_are_integers() -> None:
    assert ConjugateGradient(max_steps=np.int64(5)).max_steps == 5


def test_best_response_without_a_tensor() -> None:
    with pytest.raises(ValueError, match="theta was given without a tensor"):
        nestor.best_response(lambda t, w: w.sum(), [], torch.ones(1))


def test_a_divided_loader_keeps_its_options() -> None:
    """All options that torch lets a loader be made with, but the sampling, which is divided."""
    loader = DataLoader(list(range(8)), batch_size=4, num_workers=2, in_order=False, timeout=3, prefetch_factor=5)
    divided = Distributed.data(SimpleNamespace(rank=1, size=2), loader)  # type: ignore[arg-type]
    own = ("num_workers", "in_order", "timeout", "prefetch_factor", "pin_memory", "persistent_workers", "collate_fn")
    assert [getattr(divided, name) for name in own] == [getattr(loader, name) for name in own]
    assert list(divided.batch_sampler) == [[2, 3], [6, 7]]
