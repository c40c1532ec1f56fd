"""The picture of the example of weak labels: what is corrected, and what is trusted."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure


def draw(figure: Figure, picture: Any) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.9))
    count = len(picture.names)
    weak, truth = (F.one_hot(labels, count).float() for labels in (picture.weak, picture.truth))
    for axes, labels, title in ((left, truth, "true labels"), (middle, picture.corrected, "learned correction")):
        axes.imshow(weak.T @ labels / weak.sum(0).clamp(min=1)[:, None], cmap="magma", vmin=0, vmax=1)
        axes.set(title=f"{title} of weak labels", xlabel="label", xticks=range(count), yticks=range(count))
        axes.set_xticklabels(picture.names, rotation=90, fontsize=6)
        axes.set_yticklabels(picture.names if axes is left else [], fontsize=6)
        axes.grid(visible=False)
    left.set_ylabel("weak label")
    was, now = picture.weak == picture.truth, picture.corrected.argmax(1) == picture.truth
    for chosen, name in ((was, "right"), (~was & now, "wrong, corrected"), (~was & ~now, "wrong, still wrong")):
        label, share = f"{name} ({chosen.float().mean():.0%})", torch.full((int(chosen.sum()),), 1 / len(chosen))
        right.hist(picture.weights[chosen], 25, range=(0, 1), weights=share, histtype="step", linewidth=2, label=label)
    right.set(title="learned weights of documents", xlabel="weight", ylabel="share of documents")
    right.legend(title="weak label", fontsize=8)
