"""The picture of the example of sources: their weights during the search, and the perplexities."""

import math
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

import nestor


class NoteWeights(nestor.callbacks.Callback):
    """Notes the learned weights after every upper step."""

    def __init__(self, weights: list[Tensor], every: int) -> None:
        self.weights, self.every = weights, every

    def on_step(self, engine):
        if engine.step % self.every == 0:
            self.weights.append(torch.softmax(engine.program.levels["weights"].problem.module().detach(), 0))


class NotePerplexity(nestor.callbacks.Callback):
    """Notes the perplexity of the validation posts."""

    def __init__(self, curve: list[float]) -> None:
        self.curve = curve

    def on_validation(self, engine, metrics):
        self.curve.append(math.exp(metrics["loss"]))


def draw(figure: Figure, picture: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    weights = torch.stack([torch.full_like(picture.weights[0], 1 / len(picture.names)), *picture.weights])
    last, height, colors = picture.unroll * len(picture.weights), -1.0, colormaps["tab10"]
    for index in weights[-1].argsort().tolist():
        final = float(weights[-1, index])
        height = max(final, height + 0.05 * float(weights.max() - weights.min()))  # labels do not overlap
        left.plot(range(0, last + 1, picture.unroll), weights[:, index], color=colors(index), linewidth=2)
        left.text(1.02 * last, height, f"{picture.names[index]} {final:.2f}", color=colors(index), va="center")
    left.set(title="weights of the sources during the search", xlabel="step", xlim=(0, 1.27 * last))
    for name, curve in picture.curves.items():
        evaluations = range(1, len(curve) + 1)
        right.plot(evaluations, curve, label=name, linewidth=2.5 if name == "learned mixture" else 1.5)
    right.set(title="perplexity of the validation posts", xlabel="evaluation", yscale="log")
    right.legend(fontsize=9)
