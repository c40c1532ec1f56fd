"""Tables, the page of the documentation and pictures, all from the JSON file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.bilevel.problems import Quadratics
from benchmarks.bilevel.published import TERMS
from benchmarks.bilevel.study import METHODS, SEEDS, STUDIES, TUNING_SEED, Curve, Results, quality

# Filled by :func:`page`; the first part of the page is :data:`HEAD`.
HEAD = """\
# Public benchmark: stochastic bilevel optimization

```sh
python -m benchmarks.bilevel --quick             # does it run? seconds
python -m benchmarks.bilevel --out docs          # what is not yet in docs/bilevel.json, then this page
python -m benchmarks.bilevel --out docs --draw   # this page and its pictures from docs/bilevel.json
```

The problems are those of benchmark_bilevel (Dagreou, Ablin, Vaiter, Moreau, NeurIPS 2022; the Benchopt team). nestor's
methods stand beside SOBA, SABA, AmIGO, stocBiO and F2SA, written anew in plain torch from the papers
(`benchmarks/bilevel/published.py`, where each docstring states the equation that it implements).

**Problems.** *Quadratics*: 1,024 samples of each function, 10 and 10 variables, eigenvalues from 0.1 to 1 in both
levels, mixed derivatives of at most 0.1, float64. The value function and its gradient have a closed form; the metric is
the squared norm of the gradient at the present outer variable. *Data cleaning*: softmax regression on MNIST with
penalty 0.2, one weight for each training image, labels drawn anew with probability 0.5; the metric is the test error.

**Rules.**

- Batches have 64 samples. Step sizes are constant, the optimizer of both levels is SGD without momentum.
- Each method has the same 9 pairs of step sizes, given below its table, tried on one seed ({tuning}) and reported on
  five others ({seeds}). The quality of a trial is the median metric of its last three measurements.
- *Evaluations* are derivatives of one sample: gradients, Hessian-vector products, and products with the mixed
  derivative; a step that `Unrolled` replays has one of each. SABA's first pass over its memory counts. Runs end at
  {evaluations} evaluations.
- *Seconds* are evaluations times the seconds of an evaluation, which are measured for all methods in turn (7 rounds of
  10,000 evaluations, medians; one thread, eager) on a machine that was busy with other programs.
- The two-loop methods take 10 inner steps and 10 terms, iterations or steps of the linear system.
  `ConjugateGradient, warm` takes 2 iterations from the last solution; `Neumann, warm, 1 term` is SOBA's scheme: one
  inner step, one step of the linear system. nestor evaluates a response on the batch of the last inner step; the
  published methods draw anew.

**What was cut** from the public benchmark: 1,024 samples of the quadratics (its largest configuration has 100,000 and
25,000); 5,000 images of MNIST in place of 35,000; 9 pairs of step sizes (12 to 24 there); 5 seeds (10 there); runs of
{evaluations} evaluations, which take seconds (600 and 900 seconds there); its problems IJCNN1 and Covtype. `SAMA` is
left out: with SGD it is `FiniteDifference` with another scale. The papers were not at hand: the docstrings write each
equation out, and name algorithms from memory of the published versions.
"""

TAIL = """\
## How to read it

- **Variance reduction.** With constant steps every other method ends at a level of noise, which the batch and the step
  sizes set. SABA has no such level: on the quadratics it goes on down. nestor has no variance reduction.
- **Single loops.** T1T2, SOBA and SABA take an outer step for four or five evaluations a sample, the methods with ten
  inner steps for 22 to 41. At a budget of this size SABA, SOBA and its form in nestor lead, and T1T2 keeps up with the
  methods that solve the linear system.
- **Bias.** A response that replaces or truncates the inverse Hessian has another stationary point. On the quadratics it
  has a closed form, and the metric at that point is what no step size goes below:

{bias}

  At this budget the noise of batches of 64 samples is larger, so bias decides little here.
- **The same algorithm in nestor and in plain torch.** `Neumann, warm, 1 term` is SOBA, and nestor's `F2SA` is F2SA, up
  to the batches that they draw: they should end close to each other. An evaluation in nestor takes longer than in the
  loops of plain torch where the model is tiny: the engine's work for each step does not depend on the model.
- **Small batches, large models.** On data cleaning the Hessian of a batch has 7,840 columns, and a rank of at most 576
  before the penalty. For `ConjugateGradient, warm` the best outer step is the smallest one, at which the weights hardly
  move: two iterations that go on from the solution for another batch are mostly noise. One small step of the linear
  system (`Neumann, warm, 1 term`) averages over batches.
- **One batch or many.** `Neumann` and `ConjugateGradient` solve with the Hessian of one batch; the expected inverse of
  a random matrix is not the inverse of its mean, a second bias. stocBiO and AmIGO draw a batch for each product, and
  pay for it with a gradient each.
- **Grids.** Three by three step sizes are few; where best pairs lie at the edge, a wider grid could change the order of
  methods that are close.
"""


def bias_table(problem: Quadratics, steps: Sequence[float]) -> list[str]:
    """Return the table of the metric where biased directions vanish."""
    eye = torch.eye(problem.dims[0], dtype=torch.float64)
    hessian = problem.inner_samples.matrices[0]
    rows = {"no indirect term (`FirstOrder`)": 0 * eye, "identity (`T1T2`, `FiniteDifference`)": eye}
    for step in steps:
        series = sum(step * torch.linalg.matrix_power(eye - step * hessian, k) for k in range(TERMS))
        rows[f"{TERMS} terms of step size {step:g} (`Neumann`, `Unrolled`, stocBiO)"] = series
    rows["inverse (`ConjugateGradient`, SOBA, SABA, AmIGO)"] = torch.linalg.inv(hessian)
    lines = ["| in the place of the inverse Hessian | metric at the stationary point |", "| --- | --- |"]
    return ["  " + line for line in [*lines, *(f"| {row} | {_bias(problem.bias(m))} |" for row, m in rows.items())]]


def _bias(value: float) -> str:
    return f"{value:.2g}" if value > 1e-20 else "0"


def final(curves: Sequence[Curve]) -> list[float]:
    """Return the quality of each run, sorted."""
    return sorted(quality(curve) for curve in curves)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    ordered = sorted(values)
    return tuple(_quantile(ordered, q) for q in (0.25, 0.5, 0.75))  # type: ignore[return-value]


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (place - math.floor(place)) * (high - low)


def reaching(curve: Curve, goal: float) -> float:
    """Return the evaluations at the first measurement that is as good as the goal."""
    return next((count for count, metric in curve if metric is not None and metric <= goal), math.inf)  # type: ignore[misc]


def table(results: Results, name: str) -> list[str]:
    """Return the lines of the table of a study, the best final metric first."""
    study = STUDIES[name]
    goal = f"{study.goal:g}"
    lines = [
        f"| method | {study.metric}, at the end | quartiles | evaluations to {goal} | seconds to {goal} | "
        "microseconds of an evaluation | step sizes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for method in METHODS:
        curves = results.reported(name, method)
        if curves:
            low, middle, high = quartiles(final(curves))
            reached = statistics.median(reaching(curve, study.goal) for curve in curves)
            speed = results.speeds[name][method]
            step, outer = results.tuned(name, method)
            cells = (
                f"{middle:.3g}",
                f"{low:.3g} - {high:.3g}",
                "" if math.isinf(reached) else f"{reached:,.0f}",
                "" if math.isinf(reached) else f"{reached * speed:.2f}",
                f"{1e6 * speed:.1f}",
                f"{step:g}, {outer:g}",
            )
            rows.append((middle, f"| {method} | {' | '.join(cells)} |"))
    return [*lines, *(row for _, row in sorted(rows))]


def page(results: Results) -> str:
    """Return the page."""
    evaluations = {study.evaluations for study in STUDIES.values()}
    head = HEAD.format(
        tuning=TUNING_SEED,
        seeds=", ".join(map(str, SEEDS)),
        evaluations=" and ".join(f"{count:,}" for count in sorted(evaluations)),
    )
    about = results.about
    parts = [head, f"Measured on {about['processor']}, {about['threads']} thread, torch {about['torch']}.\n"]
    for name, study in STUDIES.items():
        if any(results.reported(name, method) for method in METHODS):
            parts.append(f"## {study.title}\n")
            parts.append(f"![{study.title}](bilevel-{name}.png)\n")
            parts.append("\n".join(table(results, name)) + "\n")
            parts.append(_grid(results, name))
    study = STUDIES["quadratics"]
    parts.append(TAIL.format(bias="\n".join(bias_table(study.build(), study.steps))))
    return "\n".join(parts)


def _grid(results: Results, name: str) -> str:
    study = STUDIES[name]
    steps, outer = (", ".join(f"{x:g}" for x in values) for values in (study.steps, study.outer_steps))
    inside = {(step, size) for step in study.steps[1:-1] for size in study.outer_steps[1:-1]}
    edge = sum(results.tuned(name, method) not in inside for method in METHODS if results.reported(name, method))
    return (
        f"Inner step sizes {steps}; outer step sizes {outer}; the best pair of {edge} of {len(METHODS)} methods is at "
        f"an edge of this grid. Medians of five seeds; an empty cell: the median run did not measure {study.goal:g}.\n"
    )


def write(results: Results) -> None:
    """Write the page and the pictures beside the JSON file."""
    path = results.path
    path.with_suffix(".md").write_text(page(results), encoding="utf-8")
    for name in STUDIES:
        if any(results.reported(name, method) for method in METHODS):
            draw(path.with_name(f"{path.stem}-{name}.png"), results, name)


def draw(path: Path, results: Results, name: str) -> None:
    """Draw medians and quartiles over evaluations and over seconds, nestor above and the published methods below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    study = STUDIES[name]
    families = {
        "nestor": [method for method in METHODS if method.startswith("nestor ")],
        "published methods": [method for method in METHODS if not method.startswith("nestor ")],
    }
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharey=True, sharex="col", layout="constrained")
    for row, (title, methods) in zip(axes, families.items(), strict=True):
        for i, method in enumerate(methods):
            curves = results.reported(name, method)
            if curves:
                _draw_curves(row, curves, results.speeds[name][method], f"C{i}", method.removeprefix("nestor "))
        row[0].set_title(f"{study.title}: {title}")
        row[0].set_ylabel(study.metric)
        row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        for axis in row:
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            if name == "quadratics":
                axis.set_yscale("log")
            else:
                axis.set_ylim(0.14, 0.3)
    axes[1, 0].set_xlabel("derivatives of one sample")
    axes[1, 1].set_xlabel("seconds (one thread)")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_curves(axes, curves: Sequence[Curve], speed: float, color: str, label: str) -> None:
    """Draw the median and the quartiles at the points that all runs have, over evaluations and over seconds."""
    columns = [points for points in zip(*curves, strict=False) if all(p[1] is not None and p[0] for p in points)]
    if not columns:
        return
    bands = [quartiles([metric for _, metric in points]) for points in columns]
    for scale, axis in zip((1.0, speed), axes, strict=True):
        at = [scale * statistics.median(count for count, _ in points) for points in columns]
        axis.plot(at, [band[1] for band in bands], color=color, label=label, linewidth=1.5)
        axis.fill_between(at, [b[0] for b in bands], [b[2] for b in bands], color=color, alpha=0.15, linewidth=0)
