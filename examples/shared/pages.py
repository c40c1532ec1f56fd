"""Writes ``docs/gallery.md``, and a table in the README, from the results in ``docs/gallery``: no number is typed.

python examples/shared/pages.py
"""

from __future__ import annotations

import ast
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE, README = ROOT / "docs" / "gallery", ROOT / "docs" / "gallery.md", ROOT / "README.md"
_DEMO, _END_OF_DEMO = "<!-- demo: written by make gallery -->", "<!-- end of demo -->"
_BEGIN, _END = "<!-- gallery: written by make gallery -->", "<!-- end of gallery -->"
_INTRODUCTION = """# Gallery

Each example is one file in `examples/`. `make data` fetches what it needs, `python examples/NAME.py` runs one seed, and
`make gallery` runs all seeds of all examples and writes this page: every number comes from `docs/gallery/NAME.json`.

Numbers are means over the seeds, with the standard error of the mean. "Beats" and "worse" mean that the mean of the
paired differences is more than one standard error from zero; a tie is what lies between. Steps, rates and the
version of every example are in its JSON file. Seconds and memory are those of one process with one thread, beside
another process on the second core. Settings were chosen on validation parts or on other seeds. While the examples were
written, test figures of single seeds were seen in trials of some of them. These choices were made after such a figure:
that the architecture waits for half of the steps (DARTS and the saliency-aware search); the draw in proportion to the
importance, and that all data are no baseline (data pruning).
"""

_PEERS = """The same experiment, with the same model, data and number of lower steps. Each library's own rates come from
the same search with the same number of trials, in `examples/peers`. `make gallery-peers` runs them in an environment
of their own. Seconds and memory are those of the whole search.
"""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard error of the mean."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def results() -> dict[str, dict[str, Any]]:
    """Return the gathered results of all examples by name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}


def number(values: Sequence[float], percent: bool) -> str:
    """Return ``mean ± standard error`` as the tables print it, on one line."""
    mean, error = mean_and_error(values)
    text = f"{100 * mean:.1f} ± {100 * error:.1f} %" if percent else f"{mean:.3g} ± {float(f'{error:.1g}'):g}"
    return text.replace(" ", "&nbsp;")


def verdict(result: dict[str, Any]) -> str:
    """Return the sentences that compare an example's method with its baselines."""
    sentences = []
    sign = 1 if result["higher_is_better"] else -1
    ours = result["methods"][result["ours"]]["metrics"][result["metric"]]
    for baseline in result["baselines"]:
        theirs = result["methods"][baseline]["metrics"][result["metric"]]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean, error = mean_and_error([sign * difference for difference in differences])
        words = "beats" if mean > error else "is worse than" if mean < -error else "does not beat"
        unit = "points" if result["percent"] else ""
        scale = 100 if result["percent"] else 1
        signed = f"{scale * sign * mean:+.3g} ± {scale * error:.2g} {unit}".strip()
        sentences.append(f"{result['ours']} {words} {baseline} ({signed}).")
    return " ".join(sentences)


def table(result: dict[str, Any]) -> str:
    """Return the table of an example's methods."""
    metrics = list(dict.fromkeys(name for method in result["methods"].values() for name in method["metrics"]))
    metrics.sort(key=lambda name: name != result["metric"])
    lines = [
        f"| method | {' | '.join(metrics)} | seconds | peak MiB |",
        "| --- " + "| ---: " * (len(metrics) + 2) + "|",
    ]
    for name, method in result["methods"].items():
        cells = [
            number(method["metrics"][metric], result["percent"] and metric == result["metric"])
            if metric in method["metrics"]
            else ""
            for metric in metrics
        ]
        seconds, memory = statistics.median(method["seconds"]), statistics.median(method["peak_memory_mib"])
        title = f"**{name}**" if name == result["ours"] else name
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.3g} | {memory:.0f} |")
    return "\n".join(lines)


def introduction(name: str) -> str:
    """Return what an example's docstring says."""
    source = ROOT / "examples" / f"{name}.py"
    return (ast.get_docstring(ast.parse(source.read_text())) or "").strip()


def summary(folder: str) -> str:
    """Return the table of all examples, one row each.

    Args:
        folder: What comes before the anchor in the links: the page, seen from where the table stands.
    """
    lines = ["| example | metric | ours | baseline | |", "| --- | --- | ---: | ---: | --- |"]
    for name, result in results().items():
        values = {method: found["metrics"][result["metric"]] for method, found in result["methods"].items()}
        best = strongest(result)
        said = verdict(result)
        outcome = "beats it" if f" beats {best} " in said else "tie" if f" beat {best} " in said else "**worse**"
        lines.append(
            f"| [{result['title']}]({folder}#{anchor(name)}) | {result['metric']} "
            f"| {number(values[result['ours']], result['percent'])} "
            f"| {best}: {number(values[best], result['percent'])} | {outcome} |"
        )
    return "\n".join(lines) + "\n"


def strongest(result: dict[str, Any]) -> str:
    """Return the baseline with the best mean of the metric."""
    sign = 1 if result["higher_is_better"] else -1

    def mean(name: str) -> float:
        return sign * statistics.fmean(result["methods"][name]["metrics"][result["metric"]])

    return max(result["baselines"], key=mean)


def side_by_side() -> str:
    """Return the section that compares libraries; p-values are of paired t-tests, corrected by Holm's method."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((RESULTS / "peers").glob("*.json"))}
    if not found:
        return ""
    pairs = [(name, peer) for name, result in found.items() for peer in result["baselines"]]
    values = holm([_p_value(found[name], peer) for name, peer in pairs])
    parts = ["## Side by side with other libraries\n", _PEERS]
    for name, result in found.items():
        docstring = ast.get_docstring(ast.parse((ROOT / "examples" / "peers" / f"{name}.py").read_text())) or ""
        tests = [
            f"Against {peer}: p = {p:.2g} (paired over {len(result['seeds'])} seeds, corrected)."
            for (other, peer), p in zip(pairs, values, strict=True)
            if other == name
        ]
        parts.append(
            f"### {result['title']}\n\n{docstring.strip()}\n\n{table(result)}\n\n{verdict(result)} {' '.join(tests)}\n"
        )
    return "\n".join(parts)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests (Holm, A simple sequentially rejective multiple test procedure, 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _p_value(result: dict[str, Any], peer: str) -> float:
    from scipy.stats import ttest_rel

    metric = result["metric"]
    ours, theirs = (result["methods"][name]["metrics"][metric] for name in (result["ours"], peer))
    return 1.0 if ours == theirs else float(ttest_rel(ours, theirs).pvalue)


def anchor(name: str) -> str:
    """Return the anchor of an example's section."""
    return name.replace("_", "-")


def render() -> str:
    """Return the text of the page."""
    parts = [_INTRODUCTION, summary("")]
    for name, result in results().items():
        versions = result["versions"]
        parts.append(
            f'<a id="{anchor(name)}"></a>\n\n## {result["title"]}\n\n{introduction(name)}\n\n'
            f"![{result['title']}](gallery/{name}.png)\n\n{table(result)}\n\n{verdict(result)}\n\n"
            f"`examples/{name}.py`, {len(result['seeds'])} seeds, torch {versions['torch']}, {versions['processor']}.\n"
        )
    return "\n".join([*parts, *([peers] if (peers := side_by_side()) else [])])


def demo() -> str:
    """Return the table of the demo: the methods of the hyper-cleaning example."""
    result = results().get("hyper_cleaning")
    if result is None:
        return ""
    accuracies = {name: method["metrics"]["accuracy"] for name, method in result["methods"].items()}
    lines = [f"| training, {len(result['seeds'])} seeds | test accuracy |", "| --- | ---: |"]
    for name in sorted(accuracies, key=lambda name: -statistics.fmean(accuracies[name])):
        bold = "**" if name == result["ours"] else ""
        lines.append(f"| {bold}{name}{bold} | {bold}{number(accuracies[name], percent=True)}{bold} |")
    auc = number(result["methods"][result["ours"]]["metrics"]["AUC of weights"], percent=False)
    return "\n".join([*lines, "", f"The learned weights tell right from wrong labels with AUC {auc}."]) + "\n"


def with_summary(readme: str) -> str:
    """Return the README with the tables of the demo and of the examples between their marks."""
    for (begin, end), text in (((_BEGIN, _END), summary("docs/gallery.md")), ((_DEMO, _END_OF_DEMO), demo())):
        before, begins, rest = readme.partition(begin)
        _, ends, after = rest.partition(end)
        if begins and ends:
            readme = f"{before}{begin}\n{text}{end}{after}"
    return readme


def write() -> None:
    """Write the page and the table of the README."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
    if README.exists():
        README.write_text(with_summary(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
