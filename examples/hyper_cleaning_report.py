"""The picture of the hyper-cleaning example: accuracies, weights, distrusted images, the program; its gallery run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

import nestor

COLOURS = {"bilevel": "#1b6ca8", "noisy labels": "#c44e52", "clean labels only": "#8c8c8c"}


def draw(outcome: Any, path: Path) -> None:
    """Draw the outcome of ``hyper_cleaning.run`` into a PNG file."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 8.6), layout="constrained")
        draw_on(figure, outcome)
        figure.savefig(path, dpi=110)


def draw_on(figure: Figure, outcome: Any) -> None:
    """Draw the outcome on a figure."""
    top, bottom = figure.subfigures(2, 1, hspace=0.04)
    left, right = top.subplots(1, 2, width_ratios=[1.15, 1])
    images, graph = bottom.subfigures(1, 2, width_ratios=[1.15, 1])
    _curves(left, outcome)
    _weights(right, outcome)
    _images(images, outcome)
    _graph(graph.subplots(), outcome.program)
    figure.suptitle(
        f"Data hyper-cleaning: {outcome.wrong.float().mean():.0%} of {len(outcome.wrong):,} training labels are "
        f"wrong; test accuracy {outcome.accuracy['bilevel']:.1%}",
        fontsize=13,
    )


def main(run: Callable[..., Any], steps: int) -> None:
    """Run the example for the gallery; what the gallery's examples share is not in the wheel of the demo."""
    from shared.experiment import Case, Experiment
    from shared.experiment import main as run_example

    def in_gallery(case: Case) -> Any:
        case.note(steps=60 if case.quick else steps, wrong_labels=0.6)
        options = {"output": case.output, "console": case.console, "method": case.method}
        outcome = run(case.seed, case.config["steps"], **options)
        for name, accuracy in outcome.accuracy.items():
            # Early stopping is the run on noisy labels, looked at earlier.
            method = case.methods.setdefault(name, replace(case.methods["noisy labels"], metrics={}))
            method.report(accuracy=accuracy, **({"AUC of weights": outcome.auc} if name == "bilevel" else {}))
        return outcome

    baselines = ("noisy labels, early-stopped", "clean labels only", "noisy labels")
    run_example(
        Experiment("Data hyper-cleaning", in_gallery, draw_on, "accuracy", "bilevel", baselines, size=(13, 8.6))
    )


def _curves(axes: Axes, outcome: Any) -> None:
    for name, curve in outcome.curves.items():
        axes.plot(curve.steps, [100 * value for value in curve.test], label=name, color=COLOURS[name], lw=2)
    axes.set(xlabel="lower steps", ylabel="test accuracy, %", title="Accuracy on unseen images")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="center right")


def _weights(axes: Axes, outcome: Any) -> None:
    bins = torch.linspace(0, float(outcome.weights.max()), 41).tolist()
    axes.hist(outcome.weights[~outcome.wrong].tolist(), bins, alpha=0.75, color="#2a9d5c", label="right labels")
    axes.hist(outcome.weights[outcome.wrong].tolist(), bins, alpha=0.65, color="#c44e52", label="wrong labels")
    axes.set(xlabel="learned weight", ylabel="training images", title=f"What it trusts (AUC {outcome.auc:.3f})")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _images(figure: SubFigure, outcome: Any) -> None:
    figure.suptitle("The images it trusts least, with the labels given (red: wrong)")
    least = outcome.weights.argsort()[:24].tolist()
    for axes, index in zip(figure.subplots(3, 8).flat, least, strict=True):
        axes.imshow(outcome.images[index].reshape(28, 28).numpy(), cmap="gray_r")
        colour = "#c44e52" if outcome.wrong[index] else "#2a9d5c"
        axes.set_title(f"“{int(outcome.labels[index])}”", fontsize=10, color=colour, pad=2)
        axes.set_axis_off()


def _graph(axes: Axes, program: nestor.Program) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title("The program")
    places = {
        name: (0.5, 0.2 + 0.58 * level.index / max(len(program.levels) - 1, 1))
        for name, level in program.levels.items()
    }
    for name, level in program.levels.items():
        size = sum(p.numel() for p in level.parameters)
        axes.annotate(
            f"{name}\n{level.loss.where.split(' ')[0]}, {size:,} variables",
            places[name],
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.7", "fc": "#eaf2f8", "ec": "#1b6ca8"},
        )
        for lower in level.lowers:
            _arrow(axes, places[lower], places[name], -0.16, "best response", "solid")
        for upper in level.uppers:
            _arrow(axes, places[upper], places[name], -0.16, "constrains", "dotted")


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float, text: str, style: str
) -> None:
    up = 1 if end[1] > start[1] else -1
    shift = 0.12 * up
    tail, head = (start[0] + shift, start[1] + 0.11 * up), (end[0] + shift, end[1] - 0.11 * up)
    axes.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "linestyle": style, "color": "#333333", "lw": 1.6})
    middle = (tail[0] + 0.03 * up, (tail[1] + head[1]) / 2)
    axes.text(*middle, text, ha="left" if up > 0 else "right", va="center", style="italic")
