"""``python -m benchmarks.bilevel``: tune, measure, draw, and write the page."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bilevel import report
from benchmarks.bilevel.study import STUDIES, Results, carry_out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bilevel", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="short runs with one pair of step sizes: does it run?")
    parser.add_argument("--draw", action="store_true", help="no runs: only the pictures and the page, from the JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/bilevel"), help="folder of bilevel.json, .md and .png")
    options = parser.parse_args()
    names = options.studies or list(STUDIES)
    if unknown := set(names) - set(STUDIES):
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    torch.set_num_threads(1)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / ("quick.json" if options.quick else "bilevel.json"))
    if not options.draw:
        for done in carry_out(results, names, quick=options.quick):
            console.print(done)
    report.write(results)
    console.print(f"{len(results.curves)} runs; wrote {results.path}, and the page and pictures beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
