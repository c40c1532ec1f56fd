"""Writes ``docs/evidence.md`` and its pictures from ``docs/evidence/*.json``: no number of a result is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from evidence.grid import MAIN, SENSITIVE, like
from evidence.meta_weight_net import STEPS, WITH_GUIDE
from matplotlib.figure import Figure

from shared import evidence_domains, evidence_few_shot, evidence_weak_labels, pages
from shared import evidence_grid as sections
from shared import evidence_solvers as solvers
from shared.evidence import Found, cell_of
from shared.evidence_short import in_short
from shared.evidence_text import listed
from shared.experiment import ROOT, STYLE
from shared.pages import mean_and_error

FOLDER, PAGE = ROOT / "docs" / "evidence", ROOT / "docs" / "evidence.md"
TASKS = {
    "reweight_and_correct": "Weak labels of text, reweighted and corrected",
    "pretrain_finetune_reweight": "Trilevel domain adaptation",
    "few_shot": "Few-shot learning",
    "network_pruning": "Network pruning",
    "data_attribution": "Data attribution",
}
GRIDS: dict[str, tuple[str, Callable[[Found], str]]] = {  # by task: the file of a grid, and what is written of it
    "reweight_and_correct": ("weak_labels", evidence_weak_labels.section),
    "pretrain_finetune_reweight": ("domain_adaptation", evidence_domains.section),
    "few_shot": ("few_shot", evidence_few_shot.section),
}

INTRODUCTION = f"""# Evidence: the papers' tables again

The questions are those that the papers' tables leave open. Is an exact derivative worth it? Does a larger guide set
help, or a longer unroll? Why are the reference's exact solvers far below its finite differences? `make evidence` runs
what is missing and writes this page: every result comes from `docs/evidence/*.json` and `docs/gallery/*.json`.

**The task** is Meta-Weight-Net (Shu et al., NeurIPS 2019): a function of the loss weighs each training image, and is
learned from the loss on a clean guide set. Data: Fashion-MNIST. *Noise p %*: 8,000 images, p % wrong labels. *IF f*:
correct labels, the largest class is f times as large as the smallest, 3,000 images in the largest. Network: two
convolutions, two linear layers, 52,000 variables. {STEPS} lower steps of 100 images, cosine schedule.

**The rules.** The guide images are among the training images of every method but `plain`. Each weighted method has
three trials of its upper rate, plain training has four trials of its lower rate. The mean accuracy on 1,000 validation
images chooses; a star marks a chosen rate at the edge of the trials. The lower rate of weighted methods is 0.1 in all
settings, which is in favour of plain training. It was chosen with seed 7, which is not reported; test figures of seed 7
were seen then. Numbers are means over seeds, with the
standard error of the mean. p: paired t-tests over the seeds, corrected by Holm's method over all tests of a table; with
three seeds such a test finds large differences only. CPU seconds: of one training, one thread, on a busy machine.

The literature's runs have ResNet-32, CIFAR and tens of thousands of steps. These small runs compare methods under equal
conditions; they do not repeat the papers' accuracies.
"""
EXACT = f"""## Is an exact derivative worth it?

Guide set of 1,000, unroll 1. `minus {WITH_GUIDE}` and `minus T1T2`: differences in points. `CG` has damping 1,
`CG, Gauss-Newton` damping 0.1, both three iterations; `Neumann` has three terms with the lower rate as step size.
`AUC of the weights`: correct against wrong labels. `weight of rare classes`: mean weight of the three rarest classes
over that of the three commonest; 1 is no correction of the imbalance.
"""
RATES = """## The upper rate

Test accuracy at six upper rates (guide set of 1,000, unroll 1). `FiniteDifference` and `SAMA` are differences, the
others exact derivatives. The lower loss detaches the losses that the weight function reads. A difference moves them
too, so it approximates the derivative of another loss. `T1T2, losses attached` is the exact derivative of that other
loss: what it shares with the differences comes from the missing detachment, not from the difference.

![Test accuracy over upper rates](evidence/rates.png)
"""
GUIDES = """## Guide set and unroll length

Upper rates are three times as large at unroll 5, which has a fifth of the upper steps. The number of lower steps is
the same. One family of tests.
"""
COMPUTE = """## Equal compute

As many lower steps as take the CPU seconds of T1T2 at unroll 1 (mean seconds of a step over the first three seeds).
The rate is that chosen at equal steps; plain training searches its own again.
"""
OTHERS = """## Other noise levels and imbalance factors

The three methods with the best validation accuracy on the two main settings, guide set of 1,000, unroll 1.
"""
WHY = """## Why are the reference's exact solvers below its finite differences?

"""
POINTS = """### Its solvers and ours at the same points

`examples/evidence/implicit_solvers.py`: a perceptron of 1,930 variables on every fourth image, pooled (IF 100), in
float64, at three points of one training. All methods get the same 20 pairs of batches. Their hypergradients are
compared with trusted ones on all images: `next step`, through one lower step; `exact`, the implicit one with the dense
Hessian, damped until it is positive definite; `attached`, `next step` of the loss that does not detach the inputs of
the weight function; `continued`, through 100 further steps of the training. Cosines are medians over the pairs.
*Reversed*: the share of pairs with a negative cosine to `exact`. Betty's defaults are one iteration and alpha 1 in both
solvers.
"""
TRAININGS = """### Its solvers and ours in the same training

IF 100, guide set of 1,000, unroll 1, small CNN, the same three upper rates for all
(`examples/evidence/betty_training.py`). Betty's `darts` is its finite difference.
"""


def read(name: str) -> dict[str, Any] | None:
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def cells(name: str) -> Found:
    """Return the cells of a grid; none if it has not been run."""
    data = read(name)
    return dict(map(cell_of, data["cells"])) if data else {}


def other_tables() -> str:
    """Return what the gallery and the other grids have measured of the papers' other tables."""
    parts, found = ["## The other tables\n"], pages.results()
    for name, title in TASKS.items():
        if name in found:
            result = found[name]
            parts.append(f"### {title}\n\n[{result['title']}](gallery.md#{pages.anchor(name)}), {len(result['seeds'])} "
                         f"seeds.\n\n{pages.table(result)}\n\n{pages.verdict(result)}\n")  # fmt: skip
        if name in GRIDS:
            grid, section = GRIDS[name]
            parts.append(section(cells(grid)))
    absent = [title for name, title in TASKS.items() if name not in found]
    parts.append(f"Not measured over five seeds yet: {listed(absent)}.\n")
    return "\n".join(parts)


def why() -> str:
    """Return the section on the reference's solvers."""
    parts, printed, data, betty = [WHY], read("published"), read("implicit_solvers"), cells("betty")
    if printed:
        parts[0] += solvers.published(printed)
    if data:
        parts += [POINTS, "![Cosines of all pairs](evidence/solvers.png)\n", solvers.spectra(data)]
        parts += [solvers.references(data), *map(solvers.cosines, data["points"])]
    if betty:
        parts += [TRAININGS, solvers.trainings(cells("meta_weight_net"), betty)]
    return "\n".join([*parts, solvers.answer(data)] if data else parts)


def render() -> str:
    """Return the text of the page."""
    found = cells("meta_weight_net")
    versions = (read("meta_weight_net") or {"versions": {}})["versions"]
    parts = [INTRODUCTION]
    if versions:
        parts.append(f"{len(found)} trainings, torch {versions['torch']}, {versions['processor']}.\n")
    parts += [in_short(found), EXACT, sections.exactness(found), RATES, sections.sensitivity(found), GUIDES]
    parts += [sections.guides_and_unrolls(found), COMPUTE, sections.equal_compute(found)]
    parts += [OTHERS, sections.other_settings(found), why(), other_tables()]
    parts += ["## What does not work, and what was cut\n", sections.errors(found), sections.cut(), "Missing cells:\n"]
    return "\n".join([*parts, sections.missing(found) + "\n"])


def draw_rates(found: Found) -> Figure:
    """Draw the test accuracy over upper rates; bands are standard errors."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, setting in zip(figure.subplots(1, 2), MAIN, strict=True):
        for method in SENSITIVE:
            values = sections.seeds_of_rates(found, like(setting, method))
            points = [(r, *mean_and_error(list(seeds.values()))) for r, seeds in values.items() if len(seeds) > 1]
            if points:
                x, mean, error = (list(column) for column in zip(*points, strict=True))
                style = "-o" if method not in ("FiniteDifference", "SAMA") else "--s"
                axis.errorbar(x, [100 * m for m in mean], [100 * e for e in error], fmt=style, label=method, ms=4)
        base = sections.at_best(found, like(setting, WITH_GUIDE))
        if base:
            level = mean_and_error(base.values("test"))[0]
            axis.axhline(100 * level, color="black", lw=1, ls=":", label=WITH_GUIDE)
        axis.set(xscale="log", xlabel="upper rate", ylabel="test accuracy (%)", title=setting)
        if axis.has_data():
            axis.legend(fontsize=8)
    return figure


def draw_solvers(data: dict[str, Any]) -> Figure:
    """Draw the cosine of each pair to the exact implicit hypergradient, at the first and the last point."""
    points = (data["points"][0], data["points"][-1])
    names = list(reversed(points[0]["rows"]))
    figure = Figure(figsize=(11, 0.26 * len(names) + 1.2), layout="constrained")
    for axis, point in zip(figure.subplots(1, 2, sharey=True), points, strict=True):
        for height, name in enumerate(names):
            values = point["rows"][name]["exact"]
            color = "C3" if name.startswith("Betty") else "C0"
            axis.plot(values, [height] * len(values), "|", color=color, ms=9)
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(xlim=(-1.05, 1.05), xlabel="cosine to the exact one", title=f"after {point['steps']} steps")
    return figure


def write(folder: Path = FOLDER) -> None:
    """Write the page and the pictures."""
    PAGE.write_text(render(), encoding="utf-8")
    with mpl.rc_context(STYLE):
        draw_rates(cells("meta_weight_net")).savefig(folder / "rates.png", dpi=110)
        if data := read("implicit_solvers"):
            draw_solvers(data).savefig(folder / "solvers.png", dpi=110)


if __name__ == "__main__":
    write()
