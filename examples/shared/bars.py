"""A picture of one number for each method."""

from collections.abc import Callable, Mapping

from matplotlib.figure import Figure


def bars(label: str, scale: float = 1.0) -> Callable[[Figure, Mapping[str, float]], None]:
    """Return what draws the numbers of methods as bars.

    Args:
        label: Of the axis.
        scale: What the numbers are multiplied by.
    """

    def draw(figure: Figure, values: Mapping[str, float]) -> None:
        numbers = [scale * value for value in values.values()]
        margin = 0.2 * (max(numbers) - min(numbers)) or 0.1 * abs(max(numbers))
        axes = figure.subplots()
        axes.barh(list(values), numbers, color="#1b6ca8")
        axes.invert_yaxis()
        axes.set(xlabel=label, xlim=(min(numbers) - margin, max(numbers) + margin))

    return draw
