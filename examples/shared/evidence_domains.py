"""The section of the page of evidence on trilevel domain adaptation."""

from __future__ import annotations

import statistics

from evidence.domain_adaptation import (
    CG,
    FIRST,
    HELD_OUT,
    LAST,
    LOWER_RATE,
    METHODS,
    PAIRS,
    PLAIN,
    RATES,
    SOLVER,
    STEPS,
    TARGET,
    VALIDATION,
    WEIGHTED,
    like,
)

from shared.evidence import Found
from shared.evidence_grid import versus
from shared.evidence_tables import Chosen, choose_by_first, failures
from shared.evidence_text import difference, family, listed, percent, plain, rate, significant, table

HEADING = "### Trilevel domain adaptation on two pairs\n"


def at_best(found: Found, setting: str, method: str) -> Chosen | None:
    """Return all seeds of a method at the rate that the held-out part chooses with the first seeds."""
    cell = like(setting, method)
    return choose_by_first(found, cell, RATES[cell.unroll], FIRST, (*FIRST, *LAST))


def strongest(chosen: dict[tuple[str, str], Chosen | None], setting: str) -> str | None:
    """Return the plain method with the largest mean accuracy on the held-out part."""
    means = {m: statistics.fmean(c.values("validation")) for m in PLAIN if (c := chosen[setting, m]) is not None}
    return max(means, key=means.__getitem__) if means else None


def task() -> str:
    """Return what the trainings are, and the rules of the comparison."""
    pairs = "; ".join(f"*{name}*: {n:,} source images, {100 * noise:.0f} % wrong labels"
                      for name, (_, n, noise) in PAIRS.items())  # fmt: skip
    return (
        f"A network is pretrained on weighted source images, another one is finetuned on {TARGET} target images near "
        f"the first, and {VALIDATION} validation images of the target decide on the weights. {pairs}; a wrong label is "
        "the next class. No emoji is in two parts, in either style. With the learned weights the two lower levels are "
        f"trained anew. In the end every method trains on all {TARGET + VALIDATION} target images; all take {STEPS} "
        "steps. Each method has three trials of a rate: the upper rate of three levels, whose lower rate is "
        f"{LOWER_RATE:g}, and the lower rate of the others. The accuracy on {HELD_OUT} held-out target images, on "
        f"which no method trains, chooses over the first {len(FIRST)} seeds; a star marks a choice at the edge of the "
        "trials. It also says which plain method is the strongest one of a pair (bold). `T1T2` and `CG`: the "
        f"identity, or {SOLVER.max_steps} iterations of conjugate gradients with damping {CG.damping:g}, in place "
        "of the inverse Hessian of the middle level. Strength: how much the finetuned network is pulled to the "
        "pretrained one. AUC: of the weights, right against wrong source labels; a half is chance.\n"
    )


def section(found: Found) -> str:
    """Return the text, one table a pair, and which differences are significant."""
    chosen = {(s, m): at_best(found, s, m) for s in PAIRS for m in METHODS}
    best = {s: strongest(chosen, s) for s in PAIRS}
    tests = family({
        f"{m}, {s}": versus(chosen[s, m], chosen[s, base]) for s, base in best.items() if base for m in WEIGHTED
    })  # fmt: skip
    text = [HEADING, task()]
    for setting in PAIRS:
        rows = []
        for method in METHODS:
            c, failed = chosen[setting, method], sum(failures(found, like(setting, method)).values())
            if c is None:
                rows += [[method, *[""] * 6, str(failed), ""]] if failed else []
                continue
            name, seconds = f"{method}, {setting}", f"{statistics.fmean(c.values('seconds')):.1f}"
            title = f"**{method}**" if method == best[setting] else method
            rows.append([title, percent(c.values("test")), rate(c), str(len(c.outcomes)), *difference(tests, name),
                         plain(c.values("auc")) if method in WEIGHTED else "", str(failed or ""), seconds])  # fmt: skip
        against = f"minus {best[setting]}" if best[setting] else "minus the strongest plain method"
        head = [setting, "test accuracy", "rate", "seeds", against, "p", "AUC", "failed trainings", "CPU seconds"]
        text.append(table(head, rows))
    text.append(
        f"Better than the strongest plain method of the pair (p < 5 %, {len(tests)} tests): "
        f"{listed(significant(tests, 1))}. Worse: {listed(significant(tests, -1))}.\n"
    )
    return "\n".join(text)
