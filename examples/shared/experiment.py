"""What every example shares: its command line, its measurements, its table, and the files that it writes."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import nestor
from shared import memory
from shared.data.places import DataMissing

ROOT = Path(__file__).parents[2]
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
NO_DATA = 3
"""Exit status of an example whose data are not there."""


@dataclass
class Method:
    """What one method of an example reached, and what it cost.

    Attributes:
        metrics: Its numbers by name.
        seconds: Wall-clock time.
        peak_memory: Largest resident memory of the process while the method ran, in MiB.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: float = 0.0

    def report(self, **metrics: Any) -> None:
        """Note numbers; tensors of one element become floats."""
        self.metrics |= {name: float(value) for name, value in metrics.items()}


@dataclass
class Case:
    """One run of an example.

    Attributes:
        seed: Seed of everything random.
        quick: Whether the run is a trial of seconds, whose numbers mean nothing.
        data: Where data are looked up first.
        output: Folder of the files that the run writes.
        console: Where it prints.
        config: Settings that are noted beside the results.
        methods: What the methods reached, by name.
    """

    seed: int
    quick: bool
    data: Path
    output: Path
    console: Console = field(default_factory=lambda: Console(soft_wrap=False, width=max(Console().width, 100)))
    config: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)

    def note(self, **settings: Any) -> None:
        """Note settings (steps, batch sizes, learning rates) beside the results."""
        self.config |= settings

    @contextmanager
    def method(self, name: str) -> Iterator[Method]:
        """Measure the seconds and the peak memory of what runs inside, under the method's name."""
        method = self.methods[name] = Method()
        torch.manual_seed(self.seed)
        memory.reset_peak()
        begin = time.perf_counter()
        yield method
        method.seconds = time.perf_counter() - begin
        method.peak_memory = memory.peak()

    def train(self, name: str, program: nestor.Program, steps: int, **options: Any) -> nestor.Engine:
        """Run a program for a number of engine steps, with a progress bar; options are those of ``nestor.Engine``."""
        callbacks = [nestor.callbacks.Progress(name, console=self.console), *options.pop("callbacks", ())]
        engine = nestor.Engine(program, seed=self.seed, callbacks=callbacks, **options)
        engine.run(steps)
        return engine


@dataclass(frozen=True)
class Experiment:
    """An example: what it runs, what its numbers mean, and what it draws.

    Attributes:
        title: The task, in a few words.
        run: Runs all methods of a case; returns what ``draw`` needs.
        draw: Draws one picture.
        metric: The metric that decides, as the methods report it.
        ours: The method that the example is about.
        baselines: The methods that it has to beat.
        higher_is_better: Whether larger values of the metric are better.
        percent: Whether the metric is printed in percent.
        size: Width and height of the picture in inches.
    """

    title: str
    run: Callable[[Case], Any]
    draw: Callable[[Figure, Any], None]
    metric: str
    ours: str
    baselines: tuple[str, ...]
    higher_is_better: bool = True
    percent: bool = True
    size: tuple[float, float] = (11.0, 4.6)


def main(experiment: Experiment) -> None:
    """Run an example from the command line; write ``result.json`` and ``picture.png`` into its output folder."""
    source = Path(sys.argv[0]).resolve()
    name = source.stem
    parser = argparse.ArgumentParser(description=experiment.title)
    parser.add_argument("--quick", action="store_true", help="a trial of seconds, whose numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where the data are (make data)")
    parser.add_argument("--output", type=Path, default=Path("runs") / name)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    case = Case(arguments.seed, arguments.quick, arguments.data, arguments.output)
    case.output.mkdir(parents=True, exist_ok=True)
    try:
        picture = experiment.run(case)
    except DataMissing as error:
        print(error, file=sys.stderr)
        raise SystemExit(NO_DATA) from None
    case.console.print(_table(experiment, case))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=experiment.size, layout="constrained")
        experiment.draw(figure, picture)
        figure.savefig(case.output / "picture.png", dpi=110)
    (case.output / "result.json").write_text(json.dumps(_result(experiment, case, source), indent=1) + "\n")
    case.console.print(f"{case.output / 'picture.png'} and {case.output / 'result.json'} written.")


def digest(source: Path) -> str:
    """Return a hash of an example's code: results of other code are not results of this one.

    Comments, layout and the docstring of the file do not count.
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def show(value: float, percent: bool) -> str:
    """Return a number as the tables print it."""
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def _table(experiment: Experiment, case: Case) -> Table:
    quick = " (quick: these numbers mean nothing)" if case.quick else ""
    table = Table("method", title=f"{experiment.title}{quick}")
    columns = [experiment.metric] + [
        name
        for name in dict.fromkeys(name for method in case.methods.values() for name in method.metrics)
        if name != experiment.metric
    ]
    for column in (*columns, "seconds", "peak MiB"):
        table.add_column(column, justify="right")
    for name, method in sorted(
        case.methods.items(),
        key=lambda item: item[1].metrics.get(experiment.metric, 0.0),
        reverse=experiment.higher_is_better,
    ):
        cells = [
            show(method.metrics[column], experiment.percent and column == experiment.metric)
            if column in method.metrics
            else ""
            for column in columns
        ]
        style = "bold" if name == experiment.ours else None
        table.add_row(name, *cells, f"{method.seconds:.1f}", f"{method.peak_memory:.0f}", style=style)
    return table


def _result(experiment: Experiment, case: Case, source: Path) -> dict[str, Any]:
    return {
        "title": experiment.title,
        "metric": experiment.metric,
        "higher_is_better": experiment.higher_is_better,
        "percent": experiment.percent,
        "ours": experiment.ours,
        "baselines": list(experiment.baselines),
        "seed": case.seed,
        "quick": case.quick,
        "source": digest(source),
        "config": case.config,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nestor": nestor.__version__,
            "processor": memory.processor(),
            "threads": torch.get_num_threads(),
        },
        "methods": {
            name: {
                "metrics": method.metrics,
                "seconds": round(method.seconds, 2),
                "peak_memory_mib": round(method.peak_memory, 1),
            }
            for name, method in case.methods.items()
        },
    }
