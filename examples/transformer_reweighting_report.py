"""The picture of the reweighted transformer: the weight function, the weights, the validation."""

from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

import nestor

LOSSES = torch.linspace(0, 6, 100)


class Watch(nestor.callbacks.Callback):
    """Notes the validation accuracy, and the weight function if there is one."""

    def __init__(self, picture: Any, name: str) -> None:
        self.picture, self.curve = picture, picture.curves.setdefault(name, [])

    def on_validation(self, engine, metrics):
        self.curve.append(metrics["accuracy"])
        if "weights" in engine.program.levels:
            with torch.no_grad():
                self.picture.functions[engine.step] = engine.program.levels["weights"].problem.module(LOSSES)


def draw(figure: Figure, picture: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    last = max(picture.functions)
    for step, weights in picture.functions.items():
        left.plot(picture.losses, weights, color=colormaps["viridis"](step / last), label=f"step {step}")
    left.set(title="learned weight function", xlabel="loss of a document", ylabel="weight")
    left.legend(fontsize=8)
    for weights, name in ((picture.right, "right labels"), (picture.wrong, "wrong labels")):
        middle.hist(weights, 30, range=(0, 1), histtype="step", linewidth=2, label=f"{name}, mean {weights.mean():.2f}")
    middle.set(title="weights of the training documents", xlabel="weight", ylabel="documents")
    middle.legend(fontsize=8)
    for name, curve in picture.curves.items():
        steps = torch.linspace(0, last, len(curve) + 1)[1:]
        right.plot(steps, curve, label=name, linewidth=2.5 if name == "reweighted" else 1.5)
    right.set(title="validation accuracy", xlabel="step")
    right.legend(fontsize=8)
