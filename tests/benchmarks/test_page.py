"""The tables of the benchmarks, and the numbers of the text beside them, are those of the JSON in the repository."""

import json
import re
from pathlib import Path
from statistics import geometric_mean

import pytest

from benchmarks import page, record
from benchmarks.measure import ratio
from benchmarks.suites import SUITES

RESULTS, ABOUT = record.read(page.records(1))


@pytest.mark.parametrize(("path", "render"), [(page.PAGE, page.page), (page.README, page.readme)])
def test_tables_are_rendered_from_the_records(path: Path, render: object) -> None:
    """``python -m benchmarks.page`` changes nothing."""
    text = path.read_text(encoding="utf-8")
    assert callable(render)
    assert render(text) == text


def test_a_record_holds_what_was_measured(tmp_path: Path) -> None:
    """What is read is what was written; suites that are measured again are replaced, the others stay."""
    first, second = ({name: RESULTS[name]} for name in ("depth", "sinusoid"))
    file = tmp_path / "record.json"
    record.update(file, first, ABOUT)
    both, about = record.update(file, second, ABOUT)
    assert list(both) == [name for name in SUITES if name in ("depth", "sinusoid")]
    assert about == ABOUT
    assert both["depth"].timings == RESULTS["depth"].timings
    assert both["depth"].verdicts == RESULTS["depth"].verdicts
    with pytest.raises(ValueError, match="holds results of"):
        record.update(file, first, {**ABOUT, "processor": "another"})


def between(suite: str, case: str, other: str) -> float:
    timings = RESULTS[suite].timings
    return ratio(timings[case], timings[other])


def test_the_numbers_of_the_text() -> None:
    """Ranges that the text gives, computed from the records."""
    text = re.sub(r"\s+", " ", page.PAGE.read_text(encoding="utf-8").partition("## What the numbers say")[2])
    exact = {s: between(s, "nestor exact", "nestor difference") for s in RESULTS if s.startswith("zoo-")}
    plain = [value for suite, value in exact.items() if suite not in page.RECURRENT]
    recurrent = sorted(exact[suite] for suite in page.RECURRENT)
    assert f"{min(plain):.2f} to {max(plain):.2f} times a central difference on twelve networks" in text
    assert (
        f"{geometric_mean(plain):.2f} in the geometric mean; {recurrent[0]:.1f} to {recurrent[1]:.2f} for an LSTM"
        in text
    )
    assert len(plain) == 12
    methods = ("difference", "conjugate gradient", "neumann")
    jax = [between("regression", f"nestor {m}, compiled", f"jax {m}, jitted") for m in methods]
    assert f"{min(jax):.1f} to {max(jax):.1f} times jitted JAX" in text
    counts = RESULTS["depth"].evaluations
    assert f"{counts['nestor frozen, difference']:.0f} loss evaluations an engine step" in text
    assert f"({counts['nestor frozen']:.0f} with `T1T2`)" in text
    assert f"take {counts['betty finite differences along every path']:.0f}" in text
    cases = ("nestor every graph kept", "nestor default, small graphs kept", "nestor sqrt(T) states kept")
    runs = [between(s, c, "hand training") for s in ("metagradient", "metagradient-images") for c in cases]
    assert f"costs {min(runs):.1f} to {max(runs):.1f} trainings" in text


def test_every_number_of_a_process_alone_is_recorded() -> None:
    """Cells of the page that are no ratios."""
    recorded = json.loads((page.RECORDS / "alone.json").read_text(encoding="utf-8"))
    section = page.PAGE.read_text(encoding="utf-8").partition(f"<!-- {page.ALONE}: begin -->")[2].partition("<!--")[0]
    values = [value for cases in recorded.values() if isinstance(cases, dict) for value in cases.values()]
    for value in values:
        assert f"{value['mebibytes']:,}" in section
