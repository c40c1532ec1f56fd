"""The picture of the saliency-aware search: the cells found, the saliency maps, the accuracies."""

from typing import Any

from matplotlib.figure import Figure

from shared.architecture_search import draw_cells


def draw(figure: Figure, picture: Any) -> None:
    left, middle, right = figure.subfigures(1, 3, width_ratios=(3.2, 3.2, 1.2))
    for axes, (name, choice) in zip(left.subplots(1, 2), picture.choices.items(), strict=True):
        draw_cells(axes, choice)
        axes.set_title(name)
    for column, pair in zip(
        middle.subplots(4, 4).reshape(8, 2), zip(picture.images, picture.maps, strict=True), strict=True
    ):
        for axes, image, colors in zip(column, pair, ("gray", "magma"), strict=True):
            axes.imshow(image[0], cmap=colors)
            axes.set_axis_off()
    middle.suptitle("images and what the first network looks at", fontsize=11)
    axes = right.subplots()
    for place, values in enumerate(picture.accuracies.values()):
        axes.plot([place] * len(values), [100 * value for value in values], "o", color=f"C{place}")
    axes.set_xticks(range(len(picture.accuracies)), picture.accuracies, rotation=60, fontsize=9)
    axes.set(title="test accuracy (%)", xlim=(-0.5, len(picture.accuracies) - 0.5))
