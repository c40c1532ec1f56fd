"""``python -m benchmarks``: measure, print tables, write JSON and a picture."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import page, record, report
from benchmarks.libraries import LIBRARIES, OWN
from benchmarks.run import Results, run
from benchmarks.suites import SUITES


def bind(threads: int) -> None:
    """Bind the process to as many cores as it may have threads: JAX takes one thread for each core that it may use."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"of {', '.join(SUITES)}; all if none is named. A part of a name stands for all that begin with it",
    )
    parser.add_argument("--peers", action="store_true", help="the other libraries too; see make bench-peers")
    parser.add_argument("--quick", action="store_true", help="three short rounds: does it run, not how fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of results.json and .png")
    parser.add_argument(
        "--page",
        action="store_true",
        help="replace these suites in docs/benchmarks and write the tables of docs/benchmarks.md and of the README; of "
        "all suites on one thread, the picture too",
    )
    options = parser.parse_args()
    chosen = {part: [n for n in SUITES if n == part or n.startswith(f"{part}-")] for part in options.suites}
    unknown = [part for part, names in chosen.items() if not names]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    torch.set_num_threads(options.threads)
    bind(options.threads)
    libraries = list(LIBRARIES) if options.peers else list(OWN)
    about = report.machine(libraries, options.threads)
    console = Console(width=None if Console().is_terminal else 160)
    results: dict[str, Results] = {}
    for name in chain(*([part] if part in SUITES else names for part, names in chosen.items())) if chosen else SUITES:
        with console.status(name) as status:
            tell = lambda what, name=name, status=status: status.update(f"{name}: {what}")  # noqa: E731
            results[name] = run(SUITES[name], libraries, quick=options.quick, tell=tell)
        if not SUITES[name].group:
            console.print(report.table(results[name]))
    for title, group in report.grouped(results.values()):
        if group[0].suite.group:
            console.print(report.comparison_table(title, group))
    record.write(options.out / "results.json", results, about)
    report.draw(options.out / "results.png", results, about)
    if options.page:
        everything, _ = record.update(page.records(options.threads), results, about)
        page.main()
        if options.threads == 1:
            report.draw(page.PAGE.with_suffix(".png"), everything, about)
    verdicts = [v for r in results.values() for v in r.verdicts]
    met = sum(v.met for v in verdicts)
    console.print(f"{met} of {len(verdicts)} bars met; wrote {options.out}/results.json and results.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
