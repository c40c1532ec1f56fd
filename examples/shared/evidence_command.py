"""The command line of a grid of ``docs/evidence.md``: run what is missing, or publish what has ended."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from shared.data.places import DataMissing
from shared.evidence import Cell, Found, Results, Run, run_grid
from shared.experiment import NO_DATA, ROOT, digest

Blocks = Mapping[str, Callable[[Found], Sequence[Cell]]]


@dataclass(frozen=True)
class Grid:
    """What a grid runs, and where its results are.

    Attributes:
        description: One sentence, for ``--help``.
        name: Name of ``docs/evidence/NAME.json``.
        source: The file whose code decides the results.
        config: Settings that all cells share.
        run: Runs a cell.
        blocks: The cells, in the order in which they are needed.
        quick: The cells of a trial of seconds, whose numbers mean nothing.
    """

    description: str
    name: str
    source: Path
    config: Mapping[str, object]
    run: Run
    blocks: Blocks
    quick: Blocks

    def results(self, quick: bool = False) -> Results:
        """Return where the cells are written: in ``runs/evidence``, and published in ``docs/evidence``."""
        folder, page = ROOT / "runs" / "evidence", ROOT / "docs" / "evidence"
        lines = folder / f"{self.name}{'-quick' if quick else ''}.jsonl"
        return Results(lines, (folder if quick else page) / f"{self.name}.json", digest(self.source), self.config)

    def command(self, processes: int = 1) -> int:
        """Run the command line; return the exit status.

        A run that was stopped goes on where it stopped. What has ended is published, also if the run is interrupted.
        """
        parser = argparse.ArgumentParser(description=self.description)
        parser.add_argument("--processes", type=int, default=processes)
        parser.add_argument("--quick", action="store_true", help="a trial of seconds; nothing is published")
        parser.add_argument("--render", action="store_true", help="run nothing: publish what has ended")
        parser.add_argument("--data", type=Path, default=ROOT / "data")
        arguments = parser.parse_args()
        torch.set_num_threads(1)
        found = self.results(arguments.quick)
        blocks = self.quick if arguments.quick else self.blocks
        try:
            if not arguments.render:
                run_grid(found, blocks, self.run, arguments.data, arguments.processes, Console())
        except DataMissing as error:
            print(error, file=sys.stderr)
            return NO_DATA
        finally:
            if not arguments.quick:
                found.publish()
        return 0
