"""The benchmarks compute the same thing in every adapter, and report what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import run as running
from benchmarks.adapters import by_hand, by_nestor
from benchmarks.measure import Timing, ratio
from benchmarks.suites import SUITES, Bar, Suite
from benchmarks.workloads import maml, metagradient, reweighting
from benchmarks.workloads.depth import Depth
from benchmarks.workloads.regression import Regression
from benchmarks.workloads.unrolling import Unrolling

ROOT = Path(__file__).parents[2]


def quality(case: Any, iterations: int) -> float:
    case.run(iterations)
    return float(case.quality())


@pytest.mark.filterwarnings("ignore:Level")
@pytest.mark.parametrize("method", ["exact", "difference", "conjugate gradient", "neumann", "unrolled"])
def test_regression_by_hand_and_here(method: str) -> None:
    """The same loss after the same iterations."""
    hand = quality(by_hand.CASES["regression"][method](Regression()), 8)
    here = quality(by_nestor.CASES["regression"][method](Regression()), 8)
    assert here == pytest.approx(hand, rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "difference"])
@pytest.mark.filterwarnings("ignore:.*differs from the one with exact derivatives")  # the weights read detached losses
def test_reweighting_by_hand_and_here(method: str) -> None:
    """On small batches."""
    hand = quality(by_hand.CASES["reweighting"][method](reweighting.images(batch=8, batches=2)), 3)
    here = quality(by_nestor.CASES["reweighting"][method](reweighting.images(batch=8, batches=2)), 3)
    assert here == pytest.approx(hand, rel=1e-4)


def test_maml_by_hand_and_here() -> None:
    """Loop, vmap, and tasks of a program."""
    loop, mapped = (quality(by_hand.CASES["maml"][name](maml.sinusoid()), 4) for name in ("loop", "vmap"))
    here = quality(by_nestor.CASES["maml"]["vmap"](maml.sinusoid()), 4)
    assert mapped == pytest.approx(loop, rel=1e-5)
    assert here == pytest.approx(loop, rel=1e-5)


def test_unrolling_by_hand_and_here() -> None:
    """The first outer iteration, in which everybody starts with a new Adam."""
    hand = quality(by_hand.CASES["unrolling"]["graph of all steps"](Unrolling(width=8, steps=10)), 1)
    for name in ("every graph kept", "default, small graphs kept", "sqrt(T) states kept"):
        here = quality(by_nestor.CASES["unrolling"][name](Unrolling(width=8, steps=10)), 1)
        assert here == pytest.approx(hand, rel=1e-4)


def test_a_metagradient_leaves_the_training_as_it_is() -> None:
    """One run: the trained model is that of the plain loop, whatever is kept for the derivative."""
    hand = quality(by_hand.CASES["metagradient"]["training"](metagradient.digits(steps=9, batch=20)), 1)
    for name, build in by_nestor.CASES["metagradient"].items():
        if "compiled" not in name:
            assert quality(build(metagradient.digits(steps=9, batch=20)), 1) == pytest.approx(hand, rel=1e-5)


def test_depth_is_linear() -> None:
    """At most 40 loss evaluations an engine step for six levels that all read each other."""
    case = by_nestor.CASES["depth"]["frozen, difference"](Depth(depth=6))
    case.run(1)
    assert case.evaluations is not None
    assert case.evaluations() <= 40


def test_ratio_is_that_of_rounds_side_by_side() -> None:
    """A machine that becomes three times as slow changes no ratio."""
    assert ratio(Timing((2.0, 6.0, 6.0), 0.0, 3), Timing((1.0, 3.0, 3.0), 0.0, 3)) == 2.0


def test_what_fails_is_a_row() -> None:
    """A library that is not there, and a case that raises."""

    def broken() -> Any:
        raise RuntimeError("no data")

    suite = Suite("broken", broken, ("regression",), "hand exact", 2, 1, 1, bars=(Bar("a", ("b",), 1.0),))
    results = running.run(suite, ["hand"], quick=True, tell=lambda _: None)
    assert not results.timings
    assert not results.verdicts
    assert results.failures["hand exact"] == "RuntimeError: no data"


def test_every_bar_is_of_a_case_that_exists() -> None:
    """A bar on a name that is misspelt would never be looked at."""
    for suite in SUITES.values():
        own = {f"nestor {method}" for family in suite.families for method in by_nestor.CASES.get(family, {})}
        assert {bar.case for bar in suite.bars} <= own
        assert suite.reference.startswith(("hand ", "nestor "))


def test_command_writes_table_json_and_picture(tmp_path: Path) -> None:
    """As a user calls it."""
    command = [sys.executable, "-m", "benchmarks", "trilevel", "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "nestor exact" in done.stdout
    assert "bars met" in done.stdout
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["machine"]["threads"] == 1
    assert content["machine"]["torch"] == torch.__version__
    assert set(content["suites"]["trilevel"]["cases"]) >= {"nestor exact", "nestor frozen"}
    assert (tmp_path / "results.png").stat().st_size > 5_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a process to cores")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_process_has_as_many_cores_as_threads(threads: int) -> None:
    """In a process of its own: XLA takes a thread for each core that it may use."""
    script = f"import os; from benchmarks.__main__ import bind; bind({threads}); print(len(os.sched_getaffinity(0)))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(found.stdout) == min(threads, len(os.sched_getaffinity(0)))
