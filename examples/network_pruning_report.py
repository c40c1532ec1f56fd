"""The picture of the pruning example: accuracy against the weights kept, and the pixels that are read."""

from typing import Any

from matplotlib.figure import Figure


def draw(figure: Figure, picture: Any) -> None:
    grid = figure.subplot_mosaic([["curves", "curves", "a", "b"], ["curves", "curves", "c", "d"]])
    axes = grid["curves"]
    for name, curve in picture.accuracies.items():
        axes.plot(picture.shares, [100 * value for value in curve], "o-", label=name)
    axes.axhline(100 * picture.dense, color="gray", ls="--", label="dense network")
    axes.set(
        xscale="log", xlabel="weights kept", ylabel="test accuracy (%)", xticks=picture.shares, ylim=(75, 96)
    )  # random masks leave the frame
    axes.set_xticks(picture.shares, [f"{share:.0%}" for share in picture.shares], minor=False)
    axes.minorticks_off()
    axes.legend()
    for place, (name, read) in zip("abcd", picture.read.items(), strict=True):
        grid[place].imshow(read, cmap="magma", vmax=8)
        grid[place].set(title=f"{name}\n{int((read > 0).sum())} pixels read", xticks=[], yticks=[])
        grid[place].grid(visible=False)
