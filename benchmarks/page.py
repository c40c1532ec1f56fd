"""``python -m benchmarks.page``: write the tables of docs/benchmarks.md and of the README from their JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks import record, report
from benchmarks.measure import ratio
from benchmarks.run import Results

ROOT = Path(__file__).parents[1]
PAGE, README, RECORDS = ROOT / "docs" / "benchmarks.md", ROOT / "README.md", ROOT / "docs" / "benchmarks"
MEASURED, ALONE, FAST = "measured, threads={}", "measured alone", "benchmarks"
RECURRENT = ("zoo-lstm-small", "zoo-lstm-large")


def records(threads: int) -> Path:
    """Return the file of the results with a number of threads."""
    return RECORDS / f"threads-{threads}.json"


def placed(text: str, name: str, content: str) -> str:
    """Replace what is between the two marks of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"


def page(text: str) -> str:
    """Return the page of the benchmarks with all that was measured."""
    for threads in (1, 2):
        text = placed(text, MEASURED.format(threads), report.markdown(*record.read(records(threads))))
    return placed(text, ALONE, _alone(json.loads((RECORDS / "alone.json").read_text(encoding="utf-8"))))


def readme(text: str) -> str:
    """Return the README with the table of the benchmarks."""
    results, _ = record.read(records(1))
    alone = json.loads((RECORDS / "alone.json").read_text(encoding="utf-8"))
    rows = [f"| {what} | {other} |" for what, other in _fast(results, alone)]
    head = "| time of an outer iteration (0.8: nestor takes 0.8 of the other's time) | divided by that of |"
    return placed(text, FAST, "\n".join([head, "| --- | --- |", *rows]) + "\n")


def _fast(results: dict[str, Results], alone: dict[str, Any]) -> Iterable[tuple[str, str]]:
    def over(suite: str, other: str) -> Callable[[str], str]:
        timings = results[suite].timings
        return lambda case: f"{ratio(timings[f'nestor {case}'], timings[other]):.2f}"

    yield _logistic(over("regression", "betty difference"), "difference", "by finite differences"), "Betty"
    yield _logistic(over("regression", "betty conjugate gradient"), "conjugate gradient", "by CG"), "Betty"
    zoo = {name: found.timings for name, found in results.items() if name.startswith("zoo-")}

    def ratios(case: str, other: str, suites: Iterable[str]) -> list[float]:
        return [ratio(zoo[suite][case], zoo[suite][other]) for suite in suites]

    plain = [suite for suite in zoo if suite not in RECURRENT]
    exact = ratios("nestor exact", "nestor difference", plain)
    betty = ratios("nestor difference", "betty difference", zoo)
    yield (
        f"Meta-Weight-Net on an MLP, two CNNs, a GRU, a transformer and a ResNet block, two sizes each: the exact "
        f"default {_range(exact)}, geometric mean {geometric_mean(exact):.2f}; on an LSTM "
        f"{_range(ratios('nestor exact', 'nestor difference', RECURRENT))}",
        f"our central differences ({_range(betty)} of Betty's)",
    )
    reused = ratios("nestor difference, reused", "betty difference", zoo)
    yield f"the same models: `FiniteDifference(reuse=True)` {_range(reused)}", "Betty's finite differences"
    sgd, adam = alone["W3, SGD"], alone["W3, Adam"]

    def apart(found: dict[str, Any], case: str, other: str, unit: str) -> str:
        return f"{found[case][unit] / found[other][unit]:.2f}"

    times = [apart(sgd, case, "betty difference", "seconds") for case in ("nestor exact", "nestor difference, reused")]
    sizes = [
        apart(sgd, case, "betty difference", "mebibytes") for case in ("nestor exact", "nestor difference, reused")
    ]
    yield (
        f"Meta-Weight-Net on a BERT-base sized transformer: exact {times[0]}, differences reused {times[1]}; memory "
        f"{sizes[0]} and {sizes[1]}",
        "Betty's finite differences",
    )
    pair = adam, "nestor sama", "betty sama"
    yield f"the same with Adam, `SAMA`: {apart(*pair, 'seconds')}, memory {apart(*pair, 'mebibytes')}", "Betty's SAMA"
    waves = over("sinusoid", "torchopt loop")
    yield f"MAML on sine waves: eager {waves('vmap')}, compiled {waves('vmap, compiled')}", "TorchOpt"
    long = alone["200 Adam steps of an MLP of width 512"]
    memory = apart(long, "nestor sqrt", "torchopt graph of all steps", "mebibytes")
    wide = over("unrolling-512", "torchopt graph of all steps")
    yield (
        f"200 Adam steps differentiated through, width 512: all graphs {wide('every graph kept')}, `sqrt` "
        f"{wide('sqrt(T) states kept')} with {memory} of the memory, compiled {wide('sqrt(T) states kept, compiled')}",
        "TorchOpt",
    )
    whole = over("metagradient", "hand training")
    yield (
        f"the derivative of a whole training run of an MLP on digits: {whole('every graph kept')}, `sqrt` "
        f"{whole('sqrt(T) states kept')}, compiled {whole('sqrt(T) states kept, compiled')}",
        "the training itself",
    )
    every = "betty finite differences along every path"
    ours, theirs = (results["depth"].evaluations[case] for case in ("nestor frozen, difference", every))
    share = over("depth", every)("frozen, difference")
    yield f"six levels, each reading every other: {share}, {ours:.0f} loss evaluations, not {theirs:.0f}", "Betty"


def _logistic(share: Callable[[str], str], case: str, how: str) -> str:
    compiled = share(f"{case}, compiled")
    return f"learned weight decay of a logistic regression, {how}: eager {share(case)}, compiled {compiled}"


def _range(numbers: Iterable[float]) -> str:
    found = sorted(numbers)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def _alone(found: dict[str, Any]) -> str:
    lines = [
        f"| W3, {found['machine']}, {found['date']} | s | MiB | foreseen | time / Betty | memory / Betty |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for setting in ("W3, SGD", "W3, Adam"):
        first = next(iter(found[setting].values()))
        for case, values in found[setting].items():
            foreseen = f"{values['foreseen']:,}" if "foreseen" in values else ""
            time, size = (values[unit] / first[unit] for unit in ("seconds", "mebibytes"))
            cells = [f"{values['seconds']:.2f}", f"{values['mebibytes']:,}", foreseen, f"{time:.2f}", f"{size:.2f}"]
            lines.append(f"| {setting.removeprefix('W3, ')}: {case} | {' | '.join(cells)} |")
    name = "200 Adam steps of an MLP of width 512"
    lines += ["", f"| {name} | MiB | foreseen |", "| --- | --- | --- |"]
    for case, values in found[name].items():
        lines.append(f"| {case} | {values['mebibytes']:,} | {values.get('foreseen', '')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    for path, render in ((PAGE, page), (README, readme)):
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
