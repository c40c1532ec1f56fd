"""Results as tables, pictures, and a part of a page of the documentation."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.libraries import version
from benchmarks.run import Results


def machine(libraries: Iterable[str], threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for library in libraries:
        try:
            versions[library] = version(library)
        except Exception:
            versions[library] = "not installed"
    return {
        "processor": _processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row a case: time, quartiles, ratio, quality, evaluations, and the bars."""
    found = []
    for name, timing in results.timings.items():
        low, high = timing.spread
        ratio = results.ratio(name)
        evaluations = results.evaluations.get(name)
        bars = [
            f"{v.ratio:.2f} of {v.against}, {'within' if v.met else 'ABOVE'} {v.at_most:g}"
            for v in results.verdicts
            if v.case == name
        ]
        found.append(
            (
                name,
                _milliseconds(timing.median),
                f"{_milliseconds(low)} - {_milliseconds(high)}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{timing.quality:.4f}",
                "" if evaluations is None else f"{evaluations:.0f}",
                "; ".join(bars),
            )
        )
    return [*found, *((name, "", "", "", "", "", reason) for name, reason in results.failures.items())]


def grouped(results: Iterable[Results]) -> list[tuple[str, list[Results]]]:
    """Collect the suites of each question, in order; a suite without a group is alone."""
    found: dict[str, list[Results]] = {}
    for result in results:
        found.setdefault(result.suite.group or result.suite.title, []).append(result)
    return list(found.items())


def comparison(group: Sequence[Results]) -> tuple[list[str], list[tuple[str, ...]]]:
    """One row a suite, one column a case: its time over that of the reference; a star marks what is above a bar."""
    cases = list(dict.fromkeys(case for result in group for case in result.timings))
    reference = group[0].suite.reference
    rows = []
    for result in group:
        above = {verdict.case for verdict in result.verdicts if not verdict.met}
        time = result.timings.get(reference)
        cells = ["" if time is None else _milliseconds(time.median)]
        for case in cases:
            found = result.ratio(case) if case in result.timings else None
            cells.append("" if found is None else f"{found:.2f}{'*' if case in above else ''}")
        rows.append((result.suite.title, *cells))
    return ["model", f"{reference}, ms", *cases], rows


def columns(results: Results) -> tuple[str, ...]:
    """The heads of :func:`rows`; the ratio is the time of an iteration over that of the reference."""
    return ("case", "ms", "quartiles", f"time / {results.suite.reference}", "loss", "evaluations", "bar")


def table(results: Results) -> Table:
    """One table a suite."""
    drawn = Table(title=results.suite.title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns(results):
        drawn.add_column(column, justify="left" if column in ("case", "bar") else "right")
    for row in rows(results):
        drawn.add_row(*row, style="red" if "ABOVE" in row[-1] else "bold" if row[0].startswith("nestor") else "")
    return drawn


def comparison_table(title: str, group: Sequence[Results]) -> Table:
    """The suites of one question."""
    heads, content = comparison(group)
    drawn = Table(title=f"{title} ({_MEANING})", title_justify="left", box=box.SIMPLE_HEAD)
    for column in heads:
        drawn.add_column(column, justify="left" if column == "model" else "right")
    for row in content:
        drawn.add_row(*row)
    return drawn


_MEANING = "time of an iteration divided by that of the reference, lower is better; * above its bar"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def draw(path: Path, results: Mapping[str, Results], about: Mapping[str, Any]) -> None:
    """Bars of the ratios to the reference, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: r for name, r in results.items() if r.timings and not r.suite.group}
    if not shown:
        return
    heights = [len(r.timings) + 1.5 for r in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, 0.3 * sum(heights) + 0.6), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, result in zip(axes[:, 0], shown.values(), strict=True):
        names = sorted(result.timings, key=lambda name: -result.timings[name].median)
        values = [1e3 * result.timings[name].median for name in names]
        colors = ["#1f6fb4" if name.startswith("nestor") else "#9a9a9a" for name in names]
        axis.barh(names, values, color=colors)
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 1.6, max(values) * 2.2)
        for place, value in enumerate(values):
            axis.text(value * 1.03, place, f"{value:.3g} ms", va="center", fontsize=7)
        axis.set_title(result.suite.title, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"milliseconds an outer iteration, {about['threads']} thread(s)", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def markdown(results: Mapping[str, Results], about: Mapping[str, Any]) -> str:
    """Return the tables of all suites for a page."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if name != "hand")
    where = f"{about['processor']}, {about['threads']} thread(s), Python {about['python']}, torch {about['torch']}"
    lines = [f"{where}; {versions}.", ""]
    for title, group in grouped(results.values()):
        if group[0].suite.group:
            heads, content = comparison(group)
            lines += [f"**{title}** ({_MEANING})", "", *_markdown(heads, content), ""]
        else:
            lines += [f"**{title}**", "", *_markdown(columns(group[0]), rows(group[0])), ""]
    return "\n".join(lines)


def _markdown(heads: Sequence[str], content: Sequence[tuple[str, ...]]) -> list[str]:
    head = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    return [*head, *(f"| {' | '.join(row)} |" for row in content)]
