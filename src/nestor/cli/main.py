"""The ``nestor`` command."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nestor import __version__
from nestor.cli.demo import run_demo
from nestor.cli.doctor import run_doctor
from nestor.cli.inspect import run_inspect
from nestor.cli.plot import run_plot
from nestor.cli.watch import run_watch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="nestor", description="Gradient-based multilevel optimization in PyTorch.")
    parser.add_argument("--version", action="version", version=f"nestor {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    demo = commands.add_parser(
        "demo",
        help="find wrong labels of digits with a bilevel program, and compare with baselines",
        description="Find the wrong training labels (60 % by default) with 200 clean images; draws report.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seed", type=int, default=0, help="split, noise and initial weights")
    demo.add_argument("--steps", type=_positive, default=argparse.SUPPRESS, help="fewer lower steps of every method")
    demo.add_argument("--noise", type=_fraction, default=0.6, help="fraction of wrong training labels")
    demo.add_argument("--output", type=Path, default="runs/demo", help="folder for report.png, metrics.jsonl, ...")
    demo.add_argument("--device", default="cpu", help="torch device, such as cpu, cuda or mps")
    demo.set_defaults(run_command=run_demo)
    plot = commands.add_parser(
        "plot",
        help="draw the metrics of runs",
        description="Draw the metrics that JSONLines writes: one panel per metric, one curve per level and run.",
    )
    plot.add_argument("runs", type=Path, nargs="+", help="a file of JSON lines, or a folder of *.jsonl files")
    plot.add_argument("--output", type=Path, default=None, help="PNG file (default: curves.png beside the first run)")
    plot.set_defaults(run_command=run_plot)
    watch = commands.add_parser(
        "watch",
        help="show the metrics of a running job in the terminal",
        description="Show the last metrics of every level and how they came there, anew when the run writes.",
    )
    watch.add_argument("run", type=Path, help="a file of JSON lines, or a folder with one")
    watch.add_argument("--every", type=_seconds, default=1.0, help="seconds between two looks at the file")
    watch.add_argument("--once", action="store_true", help="print the present state and end")
    watch.set_defaults(run_command=run_watch)
    inspect = commands.add_parser(
        "inspect",
        help="show what checkpoints contain, and whether they are whole",
        description="Show checkpoints: step, size by level, program, and whether every file is whole. Exit status 1 if "
        "one is damaged. No code of a checkpoint runs.",
    )
    inspect.add_argument("folder", type=Path, help="the folder of one checkpoint, or of a run")
    inspect.set_defaults(run_command=run_inspect)
    text = "list versions and devices, and compare hypergradients with closed forms"
    doctor = commands.add_parser("doctor", help=text, description=f"{text.capitalize()}.")
    doctor.add_argument("--no-self-test", dest="self_test", action="store_false", help="only list versions and devices")
    doctor.set_defaults(run_command=run_doctor)
    options = vars(parser.parse_args(arguments))
    return int(options.pop("run_command")(**options))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{value} must be from 0.05 to 3600")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0 and below 1")
    return value
