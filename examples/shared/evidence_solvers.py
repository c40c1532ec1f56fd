"""The section of the page of evidence on Betty's conjugate gradients and Neumann series."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evidence.grid import FIRST, LAST, RATES, like

from shared.evidence import Found
from shared.evidence_grid import at_best, versus
from shared.evidence_tables import Chosen, by_rate, choose
from shared.evidence_text import difference, family, listed, percent, plain, rate, significant, table

SETTING, DARTS, DEFAULT = "IF 100", "Betty, darts", ("Betty, neumann(1), alpha 1", "Betty, cg(1), alpha 1")
OURS = ("T1T2", "FiniteDifference", "CG", "CG, Gauss-Newton", "Neumann")


def published(data: dict[str, Any]) -> str:
    """Return the table of the paper, and how far its solvers are below its differences."""
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in data["rows"].items()]
    values = list(data["rows"].values())
    gaps = [d - statistics.fmean([c, n]) for d, c, n in zip(values[1], values[2], values[3], strict=True)]
    said = ", ".join(f"{gap:.1f} ({column})" for gap, column in zip(gaps, data["columns"], strict=True))
    return (
        table([data["title"], *data["columns"]], rows)
        + f"\nThe two solvers are below finite differences by {said} points. Source: {data['source']}.\n"
    )


def median(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def reversed_share(row: dict[str, Any]) -> float | None:
    """Return the share of pairs whose hypergradient has a negative cosine to the exact implicit one."""
    values = row["exact"]
    return sum(value < 0 for value in values) / len(values) if values else None


def spectra(data: dict[str, Any]) -> str:
    rows = [
        [f"after {point['steps']} steps, {part}", f"{s['largest']:.2f}", f"{s['smallest']:.2f}",
         f"{100 * s['negative']:.0f} %"]
        for point in data["points"] for part, s in point["spectrum"].items()
    ]  # fmt: skip
    return table(["Hessian of the lower loss", "largest eigenvalue", "smallest", "negative"], rows)


def references(data: dict[str, Any]) -> str:
    """Return the cosines of the trusted hypergradients to each other."""
    names = list(data["points"][0]["trusted"])
    rows = [
        [f"after {point['steps']} steps, {name}", *(f"{cosines[other]:.2f}" for other in names)]
        for point in data["points"]
        for name, cosines in point["trusted"].items()
    ]
    return table(["cosines of the trusted hypergradients", *names], rows)


def cosines(point: dict[str, Any]) -> str:
    """Return the median cosines of a point, the share of reversed hypergradients and the spread of the norms."""
    names, rows = list(point["trusted"]), []
    for method, row in point["rows"].items():
        share, norms = reversed_share(row), row["norm"]
        ratio = f"{max(norms) / statistics.median(norms):.1f}" if norms else "-"
        said = f"{100 * share:.0f} %" if share is not None else "-"
        rows.append([method, *(median(row[name]) for name in names), said, ratio, str(row["failed"])])
    return table([f"after {point['steps']} steps", *names, "reversed", "largest norm / median", "failed"], rows)


def at_best_of_betty(betty: Found, method: str) -> Chosen | None:
    return choose(betty, replace(like(SETTING, "T1T2"), method=method), RATES[1], (*FIRST, *LAST))


def trainings(found: Found, betty: Found) -> str:
    """Return the accuracies that Betty's and nestor's solvers reach in the same training."""
    names = list(dict.fromkeys(cell.method for cell in betty))
    chosen = {name: at_best_of_betty(betty, name) for name in names}
    chosen |= {f"nestor, {method}": at_best(found, like(SETTING, method)) for method in OURS}
    base = chosen.get(DARTS)
    tests = family({name: versus(c, base) for name, c in chosen.items() if name != DARTS})
    rows = []
    for name, c in chosen.items():
        cell = replace(like(SETTING, "T1T2"), method=name)
        outcomes = [o for seeds in by_rate(betty, cell).values() for o in seeds.values()]
        failed = sum("failure" in o for o in outcomes)
        if c is None:
            if outcomes:
                rows.append([name, "", "", str(len(outcomes)), str(failed), "", "", ""])
            continue
        rows.append([name, percent(c.values("test")), rate(c), str(len(c.outcomes)), str(failed),
                     plain(c.values("rare")), *difference(tests, name)])  # fmt: skip
    head = ["", "test accuracy", "rate", "seeds", "failed trainings", "weight of rare classes", f"minus {DARTS}", "p"]
    return (
        table(head, rows) + f"\nBelow {DARTS} (p < 5 %, {len(tests)} tests): {listed(significant(tests, -1))}. Above: "
        f"{listed(significant(tests, 1))}.\n"
    )


def answer(data: dict[str, Any]) -> str:
    """Say what the measurements say about Betty's default solvers and about its finite differences."""
    lines = ["### The answer\n"]
    for point in data["points"]:
        largest = point["spectrum"]["a batch"]["largest"]
        for name in DEFAULT:
            row = point["rows"][name]
            share = reversed_share(row)
            said = f"{100 * share:.0f} % of the pairs" if share is not None else "no pair, since none is finite"
            lines.append(
                f"- After {point['steps']} steps {name} is reversed for {said} (median cosine to `exact` "
                f"{median(row['exact'])}); the largest eigenvalue of a batch's Hessian is {largest:.1f}."
            )
        row = point["rows"][DARTS]
        lines.append(
            f"- After {point['steps']} steps the median cosine of {DARTS} to `exact` is {median(row['exact'])}, to "
            f"`attached` {median(row['attached'])}."
        )
    return "\n".join([*lines, REASONS])


REASONS = """
What Betty's code (version 0.2.1) does, and what nestor does instead:

- **Neumann.** The series alpha sum (I - alpha H)^k c converges if all eigenvalues of H are between 0 and 2 / alpha. By
  default alpha is 1 and there is one iteration: 2 c - H c. Along an eigenvector whose eigenvalue is above 2 its sign is
  wrong, and more iterations make it longer. nestor's `Neumann(step_size=None)` takes the step from the spectrum; a
  series that diverges is truncated or an error.
- **Conjugate gradients** on the Hessian of one batch, which has negative eigenvalues. There is no guard and no damping:
  in a direction of negative curvature the step length is negative, and near zero curvature it has no bound. One
  iteration is T1-T2 divided by the curvature in that direction. `cg_alpha` below 1 scales the step and not the
  residual, so the iteration is not that of conjugate gradients any more. nestor truncates at negative curvature, raises
  `SingularError` where no solution exists, and offers damping and Gauss-Newton products.
- **Finite differences** move the inputs of the weight function although the loss detaches them. They approximate the
  derivative of another loss, `attached`; conjugate gradients and Neumann series respect `detach()`. So the rows of the
  paper's table differ in the loss that is differentiated as well as in the inverse.

The paper does not state the iterations and alphas of its solvers. These runs show what the defaults and more careful
choices do on a smaller network.
"""
