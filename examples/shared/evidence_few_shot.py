"""The section of the page of evidence on few-shot learning."""

from __future__ import annotations

import statistics

from evidence.few_shot import (
    BASELINE_STEPS,
    BLOCKS,
    CHANNELS,
    METHODS,
    PRETRAINED,
    PROTOTYPES,
    RATES,
    SEEDS,
    SETTINGS,
    UPDATES,
    VALIDATION,
    like,
)

from shared.data.glyphs import SPLITS
from shared.evidence import Cell, Found
from shared.evidence_tables import Chosen, Test, choose_by_first, compare, failures
from shared.evidence_text import difference, family, listed, percent, points, rate, significant, table

OURS, BASELINES, FIRST = "MAML", (PRETRAINED, PROTOTYPES), SEEDS[:1]
HEAD = ("test accuracy", "rate", "seeds", f"{OURS} minus it", "p", "CPU seconds")
ROUNDS = {name: method[-1] for name, method in METHODS.items()}
SAID_ROUNDS = ", ".join(f"{name} {steps}" for name, steps in ROUNDS.items())
SIZES = {(shape["ways"], tasks, tests) for shape, tasks, tests in SETTINGS.values()}
SAID_SIZES = listed([f"{tasks} and {tests} ({ways} ways)" for ways, tasks, tests in sorted(SIZES)])
TRIALS = "/".join(map(str, sorted({len(rates) for rates in RATES.values()})))
INTRODUCTION = f"""### Few-shot learning: 5 and 20 ways, 1 and 5 shots

A task is to tell 5 or 20 letters, from 1 or 5 drawings of each. The letters are those of `examples/few_shot.py`, of
{SPLITS["train"]} scripts for training, {SPLITS["validation"]} for validation and {SPLITS["test"]} for the test.
{", ".join(METHODS)} learn a start and adapt it to a task by a few steps ({SAID_ROUNDS}).
`{PRETRAINED}` is a classifier of all training letters: in a task it compares normalized
features with those of each class, or with their mean. `{PROTOTYPES}` (Snell et al., NeurIPS 2017)
learns features that are near the mean of their class. These two baselines do not adapt.

Each method has {TRIALS} trials of its rate: of the steps of adaptation, or of the training for the two baselines.
{VALIDATION} validation tasks choose it, with seed {FIRST[0]} only; the other seeds run the chosen rate. A star marks a
chosen rate at the edge of the trials. The test tasks differ from seed to seed, and are the same for all methods. The
ranges of the rates and the steps of iMAML were set on validation tasks of seed 7, which is not reported.

Cut: {CHANNELS} channels, {UPDATES} updates of the start in every setting; tasks of an update and of the test:
{SAID_SIZES}. The baselines take {BASELINE_STEPS} of their steps for an update of {OURS}. Trainings are far shorter
than the papers', so the accuracies are no repetition of theirs. p: paired t-tests over the seeds, {OURS} against each
other method, corrected by Holm's method over all tests of this section. CPU seconds: of the training.
"""


def at_best(found: Found, cell: Cell) -> Chosen | None:
    """Return a method at the rate that the first seed's validation tasks choose, with all seeds that have ended."""
    return choose_by_first(found, cell, RATES[cell.method], FIRST, SEEDS)


def strongest(chosen: dict[str, Chosen | None]) -> str | None:
    """Return the baseline with the largest mean validation accuracy over the seeds that have ended."""
    means = {name: statistics.fmean(c.values("validation")) for name in BASELINES if (c := chosen[name])}
    return max(means, key=means.__getitem__) if means else None


def rows(found: Found, setting: str, chosen: dict[str, Chosen | None], tests: dict[str, tuple[Test, float]]) -> str:
    """Return the table of a setting; a method whose cells are missing has an empty row."""
    lines = []
    for method, c in chosen.items():
        if c:
            seconds = f"{statistics.fmean(c.values('seconds')):.1f}"
            lines.append([method, percent(c.values("test")), rate(c), str(len(c.outcomes)),
                          *difference(tests, f"{method}, {setting}"), seconds])  # fmt: skip
        else:
            failed = sum(failures(found, like(setting, method)).values())
            lines.append([f"{method} ({failed} errors)" if failed else method, *[""] * len(HEAD)])
    return table([setting, *HEAD], lines)


def verdict(chosen: dict[str, dict[str, Chosen | None]], tests: dict[str, tuple[Test, float]]) -> str:
    """Compare with the strongest baseline of each setting, and say which methods are better or worse."""
    said = []
    for setting, methods in chosen.items():
        name = strongest(methods)
        if f"{name}, {setting}" in tests:
            test, p = tests[f"{name}, {setting}"]
            said.append(f"{setting}: {points(test)} points against `{name}` (p = {p:.2g})")
    if not said:
        return "No comparison can be made yet.\n"
    return (
        f"{OURS} against the baseline that is strongest on the validation tasks. {'; '.join(said)}.\n\n"
        f"{OURS} is better than (p < 5 %, {len(tests)} tests): {listed(significant(tests, 1))}. It is worse than: "
        f"{listed(significant(tests, -1))}.\n"
    )


def missing(found: Found) -> str:
    """Say how many cells of each block have not ended."""
    lines = []
    for name, block in BLOCKS.items():
        cells = block(found)
        absent = sum(cell not in found for cell in cells)
        if absent or not cells:
            lines.append(f"{name}: {f'{absent} of {len(cells)}' if cells else 'all'}")
    return f"Missing cells: {'; '.join(lines)}.\n" if lines else "No cell is missing.\n"


def section(found: Found) -> str:
    """Return the text of the section."""
    if not found:
        return f"{INTRODUCTION}\nNo cell of this grid has ended yet.\n"
    chosen = {s: {name: at_best(found, like(s, name)) for name in RATES} for s in SETTINGS}
    pairs: dict[str, Test | None] = {}
    for setting, methods in chosen.items():
        ours = methods[OURS]
        pairs |= {f"{name}, {setting}": compare(ours, c) for name, c in methods.items() if ours and c and name != OURS}
    tests = family(pairs)
    tables = [rows(found, setting, methods, tests) for setting, methods in chosen.items() if any(methods.values())]
    return "\n".join([INTRODUCTION, *tables, verdict(chosen, tests), missing(found)])
