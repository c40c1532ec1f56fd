"""The section of the page of evidence that reads the grid of weakly labelled texts."""

from __future__ import annotations

import statistics

from evidence.weak_labels import (
    BLOCKS,
    BOTH,
    DIFFERENCES,
    FIRST,
    LAST,
    LOWER_RATE,
    METHODS,
    RATES,
    REPEATS,
    STEPS,
    WITH_GUIDE,
    like,
)

from shared.evidence import Found
from shared.evidence_grid import versus
from shared.evidence_tables import Chosen, choose_by_first, failures
from shared.evidence_text import difference, family, listed, percent, plain, rate, significant, table
from shared.weak_labels import GUIDES, SETTINGS, VALIDATION

SEEDS = (*FIRST, *LAST)
PARTS = ("reweight", "correct", DIFFERENCES)
"""What both upper levels together are compared with."""

INTRODUCTION = f"""### Weak labels of three text sets

The task and the networks are those of `examples/reweight_and_correct.py`: keywords label the documents, documents
without a keyword are left out, and the features are mean word vectors (`examples/evidence/weak_labels.py`). The
keywords are our own. {GUIDES} guide documents have true labels; `{WITH_GUIDE}` repeats them {REPEATS} times. {STEPS}
steps, {len(SEEDS)} seeds. {VALIDATION} validation documents choose the parameters to keep and, with the first
{len(FIRST)} seeds, one of three rates: the lower rate of plain training, or the upper rate, which all upper levels of a
method share. Their lower rate is {LOWER_RATE:g}, set with seed 7, which is not reported. A finite difference moves also
the losses that the weights read; the exact derivative takes them as numbers. `AUC of the weights`: right against wrong
weak labels. `corrected labels right`: of the documents with a keyword.
"""


def at_best(found: Found, setting: str, method: str) -> Chosen | None:
    """Return a method at the rate that the validation part of the first seeds chooses, with all its seeds."""
    cell = like(setting, method)
    return choose_by_first(found, cell, RATES[cell.unroll], FIRST, SEEDS)


def weak_labels(found: Found, setting: str) -> str:
    """Say how many documents have a weak label, and how many of these labels are right."""
    outcomes = {cell.seed: outcome for cell, outcome in found.items() if cell.setting == setting and "right" in outcome}
    if not outcomes:
        return ""
    covered, right = (statistics.fmean(o[name] for o in outcomes.values()) for name in ("covered", "right"))
    return f"{100 * covered:.0f} % of the documents have a keyword, {100 * right:.0f} % of their weak labels are right."


def one_set(found: Found, setting: str) -> str:
    """Return the table of a data set, and what is better or worse than plain training on all labels."""
    chosen = {method: at_best(found, setting, method) for method in METHODS}
    base = chosen[WITH_GUIDE]
    tests = family({method: versus(c, base) for method, c in chosen.items() if method != WITH_GUIDE})
    rows = []
    for method, c in chosen.items():
        errors = sum(failures(found, like(setting, method)).values())
        name = f"{method} ({errors} errors)" if errors else method
        if c is None:
            rows += [[name, *[""] * 8]] if errors else []
            continue
        auc, corrected = c.values("auc"), c.values("corrected")
        rows.append([name, percent(c.values("test")), rate(c), str(len(c.outcomes)), *difference(tests, method),
                     plain(auc) if auc else "", percent(corrected) if corrected else "",
                     f"{statistics.fmean(c.values('seconds')):.1f}"])  # fmt: skip
    head = ["method", "test accuracy", "rate", "seeds", f"minus {WITH_GUIDE}", "p", "AUC of the weights",
            "corrected labels right", "CPU seconds"]  # fmt: skip
    said = (
        f"Better than {WITH_GUIDE} (p < 5 %, {len(tests)} tests): {listed(significant(tests, 1))}. Worse: "
        f"{listed(significant(tests, -1))}.\n"
    )
    return "\n".join(
        [f"**{setting}.** {weak_labels(found, setting)}".rstrip() + "\n", table(head, rows), *([said] if tests else [])]
    )


def both_levels(found: Found) -> str:
    """Compare both upper levels with each alone, and with finite differences: one family of tests."""
    names = {(setting, part): f"{setting}, minus {part}" for setting in SETTINGS for part in PARTS}
    pairs = {pair: (at_best(found, pair[0], BOTH), at_best(found, *pair)) for pair in names}
    tests = family({names[pair]: versus(*sides) for pair, sides in pairs.items()})
    better, worse = significant(tests, 1), significant(tests, -1)
    return (
        f"**{BOTH}, minus its parts and minus finite differences.**\n\n"
        + table(["", "difference", "p"], [[name, *difference(tests, name)] for name in tests])
        + (f"\nAbove (p < 5 %, {len(tests)} tests): {listed(better)}. Below: {listed(worse)}.\n" if tests else "")
    )


def missing(found: Found) -> str:
    """Say how many cells have not been run; seeds whose rate is not chosen yet are among them."""
    lines = []
    for (name, block), size in zip(BLOCKS.items(), (0, len(SETTINGS) * len(METHODS) * len(LAST)), strict=True):
        cells = block(found)
        absent = max(size, len(cells)) - sum(cell in found for cell in cells)
        lines += [f"- {name}: {absent} cells are missing\n"] if absent else []
    return "".join(lines)


def section(found: Found) -> str:
    """Return the section: a table a data set, and the comparisons that are significant."""
    parts = [INTRODUCTION, *(one_set(found, setting) for setting in SETTINGS), both_levels(found), missing(found)]
    return "\n".join(part for part in parts if part)
