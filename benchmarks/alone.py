"""One case in a process of its own: its time, and the most memory that the process holds."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.libraries import builders
from benchmarks.workloads import reweighting
from benchmarks.workloads.unrolling import Unrolling

Setting = tuple[str, Callable[[], Any], Callable[[], Any]]

_SMALL = {"batch": 2, "length": 4, "layers": 1, "width": 24, "words": 8}

# Name -> family, definition, the same in small: what a library loads at first use is not the case's memory.
SETTINGS: Mapping[str, Setting] = {
    "W3, SGD": ("reweighting", lambda: reweighting.text("sgd"), lambda: reweighting.text("sgd", **_SMALL)),
    "W3, Adam": ("reweighting", lambda: reweighting.text("adam"), lambda: reweighting.text("adam", **_SMALL)),
    "unrolling, width 512": ("unrolling", lambda: Unrolling(width=512), lambda: Unrolling(width=4, steps=4)),
    "unrolling, width 64": ("unrolling", lambda: Unrolling(width=64), lambda: Unrolling(width=4, steps=4)),
}


@dataclass(frozen=True)
class Alone:
    """What a process says of its case."""

    seconds: float
    megabytes: float
    quality: float
    foreseen: float | None


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(setting: str, library: str, method: str, iterations: int) -> Alone:
    """Run the case here: seconds an outer iteration, and memory above that after a small case of the same kind."""
    family, workload, small = SETTINGS[setting]
    build = builders(library)[family][method]
    build(small()).run(2)
    before = _resident()
    case = build(workload())
    case.run(1)
    taken = []
    for _ in range(iterations):
        start = time.perf_counter()
        case.run(1)
        taken.append(time.perf_counter() - start)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    foreseen = None if case.foreseen is None else case.foreseen() / 2**20
    return Alone(statistics.median(taken), most - before, case.quality(), foreseen)


def in_a_process(setting: str, library: str, method: str, iterations: int) -> Alone:
    """Run the case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.alone", setting, library, method, "--iterations", str(iterations)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return Alone(**json.loads(done.stdout.strip().splitlines()[-1]))


def _line(found: Alone) -> str:
    line = f"{found.seconds:.3g} s, {found.megabytes:.0f} MB, loss {found.quality:.4f}"
    if found.foreseen is None:
        return line
    ratio = found.foreseen / found.megabytes
    verdict = "within 15 %" if abs(ratio - 1) <= 0.15 else "NOT within 15 %"
    return f"{line}; {found.foreseen:.0f} MB foreseen, {ratio:.2f} of that, {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=__doc__)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("cases", nargs="+", help="LIBRARY METHOD, in turn")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="measure the one case here and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pairs = list(zip(options.cases[::2], options.cases[1::2], strict=True))
    if options.json:
        print(json.dumps(vars(measure(options.setting, *pairs[0], options.iterations))))
        return 0
    for library, method in pairs:
        found = in_a_process(options.setting, library, method, options.iterations)
        print(f"{library} {method}: {_line(found)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
