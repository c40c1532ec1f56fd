"""Runs the examples over seeds, one process a core, and gathers what they write.

    PYTHONPATH=examples python -m shared.gallery [NAME ...] [--seeds 5] [--quick] [--peers] [--processes N]

A seed of an example is one process, which writes into ``runs/gallery/NAME/SEED``. What is there already, from the same
version of the example, is not run again. The seeds of an example are gathered in ``docs/gallery/NAME.json`` when all of
them have ended, beside the picture of the first one. ``--peers`` runs the programs in ``examples/peers``, which compare
libraries, in the environment that holds those; their results are in ``docs/gallery/peers``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shared import pages
from shared.experiment import NO_DATA, digest

ROOT = Path(__file__).parents[2]
RUNS, PAGES = ROOT / "runs" / "gallery", ROOT / "docs" / "gallery"


def examples(peers: bool = False) -> dict[str, Path]:
    """Return the examples by name: the programs in ``examples/``, or those in ``examples/peers``."""
    files = sorted((ROOT / "examples" / ("peers" if peers else "")).glob("*.py"))
    return {file.stem: file for file in files if not file.stem.endswith("_report")}


@dataclass(frozen=True)
class Run:
    """One seed of an example."""

    name: str
    source: Path
    seed: int
    quick: bool
    data: Path
    peers: bool = False

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        kind = RUNS.with_name(f"gallery{'-peers' if self.peers else ''}{'-quick' if self.quick else ''}")
        return kind / self.name / str(self.seed)

    def result(self) -> dict[str, Any] | None:
        """Return what the run has written, if it was this version of the example."""
        file = self.folder / "result.json"
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        return found if found["source"] == digest(self.source) else None

    def __call__(self) -> int:
        """Run the example unless its result is there; return its exit status."""
        if self.result() is not None and not self.quick:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(self.source), "--seed", str(self.seed), "--data", str(self.data)]
        command += ["--output", str(self.folder), *(["--quick"] if self.quick else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / "log.txt").open("w") as log:
            ended = subprocess.run(
                command, check=False, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
        return ended.returncode


def gather(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the results of an example, with a list of numbers by seed for each method; None if a seed is missing."""
    found = [run.result() for run in runs]
    results = [result for result in found if result is not None]
    if len(results) < len(runs):
        return None
    gathered = {key: value for key, value in results[0].items() if key not in ("seed", "quick", "methods")}
    gathered["seeds"] = [result["seed"] for result in results]
    gathered["methods"] = {
        name: {
            "metrics": {
                metric: [result["methods"][name]["metrics"][metric] for result in results]
                for metric in method["metrics"]
            },
            "seconds": [result["methods"][name]["seconds"] for result in results],
            "peak_memory_mib": [result["methods"][name]["peak_memory_mib"] for result in results],
        }
        for name, method in results[0]["methods"].items()
    }
    return gathered


def publish(runs: Sequence[Run]) -> bool:
    """Write the gathered results and the picture of an example; return whether all of its seeds are there."""
    gathered = gather(runs)
    if gathered is None:
        return False
    folder = PAGES / "peers" if runs[0].peers else PAGES
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{runs[0].name}.json").write_text(json.dumps(gathered, indent=1) + "\n")
    if not runs[0].peers:
        shutil.copyfile(runs[0].folder / "picture.png", folder / f"{runs[0].name}.png")
    return True


def main() -> int:
    """Run, gather and say how each seed ended; return 1 if one failed."""
    parser = argparse.ArgumentParser(description="Run the examples over seeds and gather their results.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples (default: all)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed of each for seconds; nothing is gathered")
    parser.add_argument("--peers", action="store_true", help="the programs that compare libraries (make gallery-peers)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    found, console = examples(arguments.peers), Console()
    unknown = set(arguments.names) - set(found)
    if unknown:
        parser.error(f"no example is called {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    seeds = 1 if arguments.quick else arguments.seeds
    runs = {
        name: [Run(name, found[name], seed, arguments.quick, arguments.data, arguments.peers) for seed in range(seeds)]
        for name in arguments.names or found
    }

    def say(run: Run) -> int:
        begin = time.perf_counter()
        status = run()
        ending = {0: "ended", NO_DATA: "has no data (make data)"}.get(status, f"FAILED: {run.folder / 'log.txt'}")
        console.print(
            f"{run.name}, seed {run.seed}: {ending} ({time.perf_counter() - begin:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
        if not run.quick and publish(runs[run.name]):
            console.print(f"{run.name}: its {seeds} seeds are in docs/gallery", highlight=False, soft_wrap=True)
        return status

    with ThreadPoolExecutor(arguments.processes) as executor:
        statuses = list(executor.map(say, [run for each in runs.values() for run in each]))
    if not arguments.quick:
        pages.write()
    return int(any(status not in (0, NO_DATA) for status in statuses))


if __name__ == "__main__":
    raise SystemExit(main())
