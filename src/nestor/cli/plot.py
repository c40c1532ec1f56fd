"""``nestor plot``: draw the metrics that runs write as JSON lines."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# The palette of Okabe and Ito, which colour-blind readers can distinguish, without black and yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#555555"
STYLES = ("-", "--", ":", "-.")
VALIDATION = "validation"
# Entries of a JSON line that are neither metrics nor labels of the run.
OWN = ("step", "seconds")
# A curve with more points is drawn thin, below its running mean over a fiftieth of the points.
DENSE = 400
# A panel whose largest value exceeds the smallest by this factor is logarithmic.
LOGARITHMIC = 100.0


# A metric of one level in one run: pieces (steps, values), each with increasing steps.
Curve = list[tuple[list[float], list[float]]]
# Curves by panel (the name of the metric), then by (run, level).
Curves = Mapping[str, Mapping[tuple[str, str], Curve]]


def run_plot(*, runs: Sequence[Path], output: Path | None) -> int:
    """Draw the metrics of runs; return the exit status.

    Args:
        runs: For each run a file of JSON lines, or a folder of ``*.jsonl`` files.
        output: The PNG file; None is ``curves.png`` in the folder of the first run.
    """
    console = Console()
    if importlib.util.find_spec("matplotlib") is None:
        console.print("nestor plot needs matplotlib: pip install 'nestor\\[matplotlib]'", style="red")
        return 1
    try:
        written = plot(*runs, output=output)
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"Wrote {written}", soft_wrap=True, highlight=False)
    return 0


def plot(*runs: Path, output: Path | None = None) -> Path:
    """Draw one panel per metric, with one curve per level and run, and save the figure as a PNG file.

    A panel is logarithmic if its values are positive and span more than two decades.

    Args:
        *runs: Files that :class:`nestor.callbacks.JSONLines` wrote, or folders of ``*.jsonl`` files. Lines with
            different labels belong to different runs. Several runs are named after the folders or files.
        output: The PNG file; None is ``curves.png`` in the folder of the first run.

    Returns:
        The path of the PNG file.

    Raises:
        FileNotFoundError: If the file or folder does not exist, or the folder contains no ``*.jsonl`` file.
        ValueError: If a line is malformed, or no line contains a metric.
    """
    names = _names(runs) if len(runs) > 1 else [""]
    files = {file: name for run, own in zip(runs, names, strict=True) for file, name in _files(run, own)}
    target = output or (runs[0] if runs[0].is_dir() else runs[0].parent) / "curves.png"
    curves = read(files)
    figure = _draw(curves, title=" and ".join(_names(runs)) if len(runs) < 4 else f"{len(runs)} runs")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    return target


def read(files: Mapping[Path, str]) -> Curves:
    """Read the metrics from files of JSON lines.

    Args:
        files: The files, each with its name. If there are several, each is a run of its own.

    Raises:
        ValueError: If a line is malformed, or no line contains a metric.
    """
    curves: dict[str, dict[tuple[str, str], Curve]] = defaultdict(lambda: defaultdict(list))
    for file, name in files.items():
        for entry in _entries(file):
            labels = [
                value if isinstance(value, str) else f"{key}={value}"
                for key, value in entry.items()
                if key not in OWN and "/" not in key
            ]
            run = ", ".join([name, *labels] if len(files) > 1 else labels)
            for key, value in entry.items():
                level, slash, metric = key.partition("/")
                if slash and isinstance(value, int | float):
                    panel = curves[f"{VALIDATION}: {metric}" if level == VALIDATION else metric]
                    _add_point(panel[run, level], entry["step"], value)
    if not curves:
        raise ValueError(
            f"{' and '.join(map(str, files))}: no metrics to draw. Such a file is written by "
            "Engine(callbacks=[nestor.callbacks.JSONLines(path)])."
        )
    first = ("loss", "gradient_norm")
    others = [name for name in curves if name not in first and not name.startswith(VALIDATION)]
    order = [*(name for name in first if name in curves), *(n for n in curves if n.startswith(VALIDATION)), *others]
    return {name: curves[name] for name in order}


def _add_point(curve: Curve, step: float, value: float) -> None:
    """Append a point. A smaller step begins a new piece: a second run has appended to the file."""
    if not curve or step < curve[-1][0][-1]:
        curve.append(([], []))
    steps, values = curve[-1]
    steps.append(step)
    values.append(value)


def _names(runs: Sequence[Path]) -> list[str]:
    """Name the runs: as short as they differ."""
    paths = [run.resolve() for run in runs]
    length = max(len(path.parts) for path in paths)
    for count in range(1, length + 1):
        names = ["/".join(path.with_suffix("").parts[-count:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
    return [str(path) for path in paths]


def _files(run: Path, name: str) -> list[tuple[Path, str]]:
    """List the files of a run, each with its name: that of the run, if it has one file only.

    Args:
        run: A file, or a folder of files.
        name: The name of the run; empty if there is only one.
    """
    if not run.exists():
        raise FileNotFoundError(f"{run}: there is no such file or folder.")
    if not run.is_dir():
        return [(run, name)]
    files = sorted(run.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{run}: the folder has no *.jsonl file. A run writes one with "
            f"Engine(callbacks=[nestor.callbacks.JSONLines({str(run / 'metrics.jsonl')!r})])."
        )
    if len(files) == 1:
        return [(files[0], name)]
    return [(file, f"{name}/{file.stem}" if name else file.stem) for file in files]


def _entries(file: Path) -> Iterable[Mapping[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1:  # a running or killed run has not completed this line
                return
            raise ValueError(f"{file}, line {number} is not JSON ({error}): {line[:60]!r}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int | float):
            raise ValueError(f'{file}, line {number} is no object with a number "step": {line[:60]!r}')
        yield entry


def _draw(curves: Curves, title: str) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs = list(dict.fromkeys(run for panel in curves.values() for run, _ in panel))
    levels = list(dict.fromkeys(level for panel in curves.values() for _, level in panel if level != VALIDATION))
    columns = min(len(curves), 2 if len(curves) <= 4 else 3)
    rows = math.ceil(len(curves) / columns)
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.7), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (name, panel) in zip(panels, curves.items(), strict=False):
            for (run, level), curve in panel.items():
                one = len(levels) if level == VALIDATION else levels.index(level)
                _line(axes, curve, COLOURS[one % len(COLOURS)], STYLES[runs.index(run) % len(STYLES)])
            _finish(axes, name, [v for curve in panel.values() for _, values in curve for v in values])
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        for axes in panels[max(len(curves) - columns, 0) : len(curves)]:
            axes.set_xlabel("engine steps")
        handles = _handles(levels, runs, curves)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
        figure.suptitle(title, fontsize=12)
        return figure


def _line(axes: Axes, curve: Curve, colour: str, style: str) -> None:
    for steps, values in curve:
        shown = values
        if _is_noisy(values):
            axes.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
            shown = _smooth(values, len(values) // 100)
        marker = "o" if len(values) <= 12 else ""
        axes.plot(steps, shown, color=colour, ls=style, lw=1.7, marker=marker, ms=4)


def _is_noisy(values: Sequence[float]) -> bool:
    """Return True for a curve with many points that is no step function, such as a learning rate."""
    return len(values) > DENSE and all(map(math.isfinite, values)) and len(set(values)) > len(values) // 2


def _finish(axes: Axes, name: str, values: Sequence[float]) -> None:
    axes.set_title(name.replace("_", " "), fontsize=10.5)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    finite = list(filter(math.isfinite, values))
    if finite and min(finite) > 0 and max(finite) > LOGARITHMIC * min(finite):
        axes.set_yscale("log")


def _handles(levels: Sequence[str], runs: Sequence[str], curves: Curves) -> list[Line2D]:
    """Build the legend: colours are levels, line styles are runs, thin lines are unsmoothed values."""
    from matplotlib.lines import Line2D

    names = [*levels, *([VALIDATION] if any(name.startswith(VALIDATION) for name in curves) else [])]
    colours = zip(names, cycle(COLOURS), strict=False)
    handles = [Line2D([], [], color=colour, lw=2.2, label=name) for name, colour in colours]
    if len(runs) > 1:
        styles = zip(runs, cycle(STYLES), strict=False)
        handles += [Line2D([], [], color=GREY, ls=style, label=run or "run") for run, style in styles]
    pieces = [values for panel in curves.values() for curve in panel.values() for _, values in curve]
    if any(map(_is_noisy, pieces)):
        handles.append(Line2D([], [], color=GREY, lw=0.6, alpha=0.5, label="every value (bold: mean over 2 %)"))
    return handles


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over each point and ``window`` points on either side, fewer at the ends."""
    sums = list(accumulate(values, initial=0.0))
    ends = [(max(i - window, 0), min(i + window + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ends]
