"""The sections of the page of evidence that read the grid of Meta-Weight-Net."""

from __future__ import annotations

import statistics

from evidence import grid
from evidence.grid import FIRST, LAST, MAIN, METHODS, RATES, SENSITIVE, WIDE, like
from evidence.meta_weight_net import PLAIN, STEPS, WITH_GUIDE

from shared.evidence import Cell, Found
from shared.evidence_tables import Chosen, Test, by_rate, choose, compare, failures
from shared.evidence_text import difference, family, listed, percent, plain, rate, significant, table

SEEDS = (*FIRST, *LAST)


def at_best(found: Found, cell: Cell) -> Chosen | None:
    """Return a method at the rate of its unroll length that the validation part chooses."""
    return choose(found, cell, RATES[cell.unroll], SEEDS)


def versus(ours: Chosen | None, theirs: Chosen | None) -> Test | None:
    """Compare two choices, if both are there."""
    return compare(ours, theirs) if ours and theirs else None


def exactness(found: Found) -> str:
    """All methods at unroll 1 with 1,000 guide images, each at its best rate."""
    text, against_plain, against_exact = [], {}, {}
    chosen = {(s, m): at_best(found, like(s, m)) for s in MAIN for m in (PLAIN, WITH_GUIDE, *METHODS)}
    for setting, method in chosen:
        if method in METHODS:
            against_plain[f"{method}, {setting}"] = versus(chosen[setting, method], chosen[setting, WITH_GUIDE])
            if method != "T1T2":
                against_exact[f"{method}, {setting}"] = versus(chosen[setting, method], chosen[setting, "T1T2"])
    plains, exacts = family(against_plain), family(against_exact)
    for setting in MAIN:
        rows = []
        for method in (PLAIN, WITH_GUIDE, *METHODS):
            c = chosen[setting, method]
            if c is None:
                rows.append([method, *[""] * 8] if not failures(found, like(setting, method)) else
                            [f"{method} (errors, below)", *[""] * 8])  # fmt: skip
                continue
            name = f"{method}, {setting}"
            what = c.values("auc") or c.values("rare")
            seconds = f"{statistics.fmean(c.values('seconds')):.1f}"
            rows.append([method, percent(c.values("test")), rate(c), str(len(c.outcomes)), *difference(plains, name),
                         *difference(exacts, name), f"{plain(what)}" if what else "", seconds])  # fmt: skip
        learned = "AUC of the weights" if setting.startswith("noise") else "weight of rare classes"
        head = ["method", "test accuracy", "rate", "seeds", f"minus {WITH_GUIDE}", "p", "minus T1T2", "p", learned,
                "CPU seconds"]  # fmt: skip
        text += [f"### {setting}\n", table(head, [row + [""] * (len(head) - len(row)) for row in rows])]
    text.append(
        f"Better than {WITH_GUIDE} (p < 5 %, {len(plains)} tests): {listed(significant(plains, 1))}. Worse: "
        f"{listed(significant(plains, -1))}.\n\nBetter than T1T2 (p < 5 %, {len(exacts)} tests): "
        f"{listed(significant(exacts, 1))}. Worse: {listed(significant(exacts, -1))}.\n"
    )
    return "\n".join(text)


def seeds_of_rates(found: Found, cell: Cell) -> dict[float, dict[int, float]]:
    """Return test accuracies by rate and seed: the wide rates, the seeds that all of them have."""
    outcomes = {r: seeds for r, seeds in by_rate(found, cell).items() if r in WIDE}
    tests = {r: {s: o["test"] for s, o in seeds.items() if "test" in o} for r, seeds in outcomes.items()}
    shared = [s for s in SEEDS if tests and all(s in seeds for seeds in tests.values())]
    return {r: {s: seeds[s] for s in shared} for r, seeds in tests.items()} if shared else {}


def over_rates(found: Found, cell: Cell) -> Chosen | None:
    """Return the mean of the test accuracy over all wide rates as if it were a method; None if a rate is missing."""
    values = seeds_of_rates(found, cell)
    if set(values) != set(WIDE):
        return None
    means = {s: statistics.fmean(seeds[s] for seeds in values.values()) for s in next(iter(values.values()))}
    return Chosen(cell, {s: {"test": mean} for s, mean in means.items()}, {})


def sensitivity(found: Found) -> str:
    """Test accuracy over upper rates."""
    rows, tests, means = [], {}, {}
    for setting in MAIN:
        for method in SENSITIVE:
            means[setting, method] = over_rates(found, like(setting, method))
            if method != "T1T2":
                name = f"{method}, {setting}"
                tests[name] = versus(means[setting, method], means[setting, "T1T2"])
    made = family(tests)
    for (setting, method), mean in means.items():
        values = seeds_of_rates(found, like(setting, method))
        if not values:
            continue
        average = percent(mean.values("test")) if mean else ""
        cells = [percent(list(values[r].values())) if r in values else "" for r in WIDE]
        rows.append([f"{setting}, {method}", *cells, average, *difference(made, f"{method}, {setting}")])
    head = ["upper rate", *(f"{r:g}" for r in WIDE), "mean over rates", "minus T1T2", "p"]
    worse, better = significant(made, -1), significant(made, 1)
    return (
        table(head, rows) + f"\nBelow T1T2 in the mean over rates (p < 5 %, {len(made)} tests): {listed(worse)}. "
        f"Above: {listed(better)}.\n"
    )


def guides_and_unrolls(found: Found) -> str:
    """A guide of 100 against 1,000, unroll 1 against 5."""
    rows, tests = [], {}
    corners = ((100, 1), (1_000, 1), (100, 5), (1_000, 5))
    for setting in MAIN:
        for method in (WITH_GUIDE, *METHODS):
            chosen = {c: at_best(found, like(setting, method, *c)) for c in corners}
            if method == WITH_GUIDE:
                chosen[100, 5] = chosen[1_000, 5] = None
            name = f"{method}, {setting}"
            tests[f"{name}: unroll 5 against 1"] = versus(chosen[1_000, 5], chosen[1_000, 1])
            tests[f"{name}: guide 1,000 against 100"] = versus(chosen[1_000, 1], chosen[100, 1])
            rows.append((name, [percent(c.values("test")) if c else "" for c in chosen.values()]))
    made = family(tests)
    full = [
        [name, *cells, *difference(made, f"{name}: guide 1,000 against 100"),
         *difference(made, f"{name}: unroll 5 against 1")]
        for name, cells in rows if any(cells)
    ]  # fmt: skip
    head = ["", "guide 100, unroll 1", "1,000, unroll 1", "100, unroll 5", "1,000, unroll 5", "1,000 minus 100", "p",
            "unroll 5 minus 1", "p"]  # fmt: skip
    return table(head, full)


def equal_compute(found: Found) -> str:
    """As many seconds as T1T2 takes for its steps at unroll 1."""
    rows, tests = [], {}
    for setting in MAIN:
        exact = at_best(found, like(setting, "T1T2"))
        for method, unroll in ((PLAIN, 0), (WITH_GUIDE, 0), *grid.CONTENDERS):
            pair = grid.at_equal_compute(found, setting, method, unroll)
            if pair is None:
                continue
            rates = RATES[0] if unroll == 0 else [pair[1].cell.rate] if pair[1] else []
            c = choose(found, pair[0], rates, SEEDS) if rates else None
            name = f"{setting}, {method}{f', unroll {unroll}' if unroll > 1 else ''}"
            tests[name] = versus(c, exact)
            if c:
                rows.append((name, [str(pair[0].steps), percent(c.values("test")), str(len(c.outcomes))]))
    made = family(tests)
    full = [[name, *cells, *difference(made, name)] for name, cells in rows]
    better = significant(made, 1)
    return (
        table(["", "lower steps", "test accuracy", "seeds", "minus T1T2, unroll 1", "p"], full)
        + f"\nBetter than T1T2 with {STEPS} steps at equal seconds (p < 5 %, {len(made)} tests): {listed(better)}. "
        f"Worse: {listed(significant(made, -1))}.\n"
    )


def other_settings(found: Found) -> str:
    """The three best methods on other noise levels and imbalance factors."""
    rows, tests = [], {}
    methods = (PLAIN, WITH_GUIDE, *grid.best(found))
    for setting in grid.OTHERS:
        chosen = {method: at_best(found, like(setting, method)) for method in methods}
        for method, c in chosen.items():
            name = f"{setting}, {method}"
            if method not in (PLAIN, WITH_GUIDE):
                tests[name] = versus(c, chosen[WITH_GUIDE])
            if c:
                rows.append((name, [percent(c.values("test")), rate(c), str(len(c.outcomes))]))
    made = family(tests)
    full = [[name, *cells, *difference(made, name)] for name, cells in rows]
    return (
        table(["", "test accuracy", "rate", "seeds", f"minus {WITH_GUIDE}", "p"], full)
        + f"\nBetter than {WITH_GUIDE} (p < 5 %, {len(made)} tests): {listed(significant(made, 1))}. Worse: "
        f"{listed(significant(made, -1))}.\n"
    )


def errors(found: Found) -> str:
    """Trainings that ended with an error."""
    rows = []
    for setting in MAIN:
        for method in (*METHODS, *grid.UNDAMPED):
            for unroll in (1, 5):
                cell = like(setting, method, unroll=unroll)
                table_of = by_rate(found, cell)
                outcomes = [o for seeds in table_of.values() for o in seeds.values()]
                failed = [o["failure"].split(":")[0] for o in outcomes if "failure" in o]
                if failed or (method in grid.UNDAMPED and outcomes):
                    rows.append([f"{setting}, {method}, unroll {unroll}", f"{len(failed)} of {len(outcomes)}",
                                 listed(sorted(set(failed)))])  # fmt: skip
    return table(["", "trainings that ended with an error", "error"], rows)


def missing(found: Found) -> str:
    """Blocks whose cells are not all there."""
    lines = []
    for name, block in grid.BLOCKS.items():
        cells = dict.fromkeys(block(found))
        absent = sum(cell not in found for cell in cells)
        if absent or not cells:
            lines.append(f"- {name}: {f'{absent} of {len(cells)}' if cells else 'all'} cells are missing")
    return "\n".join(lines) or "No cell is missing."


def cut() -> str:
    """Say what the grid leaves out of the full product of settings, guides, unrolls, methods, rates and seeds."""
    small = [method for method in METHODS if method not in grid.SMALL_GUIDE]
    three = "guide set of 100, equal compute"
    return (
        f"Cut from the full grid: {listed(small)} with the guide set of 100; other settings with the guide set of 100 "
        f"or unroll 5; {LAST[-1] + 1} seeds for {three} ({len(FIRST)} there).\n"
    )
