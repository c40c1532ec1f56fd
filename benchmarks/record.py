"""What was measured, as JSON: written after a run, read by what shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Timing
from benchmarks.run import Results, Verdict
from benchmarks.suites import SUITES

Record = tuple[dict[str, Results], dict[str, Any]]
"""The results by suite, and what they depend on: the machine, the number of threads, the versions."""


def write(path: Path, results: Mapping[str, Results], about: Mapping[str, Any]) -> None:
    """Write everything, for another program and for :func:`read`."""
    content = {
        "machine": about,
        "suites": {
            name: {
                "title": r.suite.title,
                "reference": r.suite.reference,
                "cases": {
                    case: {
                        "median_s": t.median,
                        "quartiles_s": t.spread,
                        "rounds_s": t.rounds,
                        "ratio": r.ratio(case),
                        "quality": t.quality,
                        "outer_iterations": t.iterations,
                        "evaluations": r.evaluations.get(case),
                    }
                    for case, t in r.timings.items()
                },
                "bars": [{**vars(v), "met": v.met} for v in r.verdicts],
                "failures": r.failures,
            }
            for name, r in results.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Record:
    """Read what :func:`write` has written; suites that are no longer there are left out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {name: _results(name, suite) for name, suite in content["suites"].items() if name in SUITES}
    return {name: found[name] for name in SUITES if name in found}, content["machine"]


def _results(name: str, suite: Mapping[str, Any]) -> Results:
    cases = suite["cases"]
    return Results(
        SUITES[name],
        {case: Timing(tuple(c["rounds_s"]), c["quality"], c["outer_iterations"]) for case, c in cases.items()},
        {case: c["evaluations"] for case, c in cases.items() if c["evaluations"] is not None},
        dict(suite["failures"]),
        [Verdict(v["case"], v["against"], v["ratio"], v["at_most"]) for v in suite["bars"]],
    )


def update(path: Path, results: Mapping[str, Results], about: Mapping[str, Any]) -> Record:
    """Replace the suites that were measured again in a file, and return all that it holds now.

    Raises:
        ValueError: If the file holds results of another machine or of other versions: one table would mix them.
    """
    kept: dict[str, Results] = {}
    if path.exists() and set(results) != set(SUITES):
        kept, before = read(path)
        if before != dict(about):
            raise ValueError(
                f"{path} holds results of {before}, and these are of {dict(about)}. Measure all suites, or write to "
                "another page."
            )
    merged = {**kept, **results}
    write(path, {name: merged[name] for name in SUITES if name in merged}, about)
    return read(path)
