"""Two processes: all cells of the runtimes, for the test to compare. ``torchrun ... processes.py FOLDER``.

Each of them also computes the cells of compiled steps for half of the kinds, in one process.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from columns import COMPILED, RUNTIMES
from outcomes import cell
from rows import KINDS

# A process that waits this long for the other one is a defect.
_PATIENCE = timedelta(seconds=30)


class Files:
    """Exchanges values through files: a process that has failed takes part in no collective operation."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self._folder, self._rank, self._size, self._count = folder, rank, size, 0

    def __call__(self, value: Any) -> list[Any]:
        self._count += 1
        written = self._folder / f"{self._count}-{self._rank}.tmp"
        written.write_bytes(pickle.dumps(value))
        written.rename(written.with_suffix(".pickle"))
        return [self._read(self._folder / f"{self._count}-{rank}.pickle") for rank in range(self._size)]

    def _read(self, path: Path) -> Any:
        begin = time.monotonic()
        while not path.exists():
            if time.monotonic() - begin > 2 * _PATIENCE.total_seconds():
                raise TimeoutError(f"{path.name}: the other process hangs")
            time.sleep(0.0005)
        return pickle.loads(path.read_bytes())


def main(folder: Path) -> None:
    """Compute the cells; each process writes those that it has computed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_PATIENCE)
    exchange = Files(folder, dist.get_rank(), dist.get_world_size())
    wanted = os.environ.get("NESTOR_GUARANTEES", "").split()
    cells: dict[str, dict[str, str]] = {}
    for kind, make in KINDS.items():
        if wanted and kind not in wanted:
            continue
        cells[kind] = {}
        for name, column in RUNTIMES.items():
            torch.manual_seed(dist.get_rank())
            text = cells[kind][name] = cell(make, column, exchange)
            if text.startswith("DIFFERS"):
                # The other process may still be in a collective operation of this run.
                raise SystemExit(f"{kind}, {name}: {text}")
    from torch._inductor import compile_fx  # here, because the workers of loaders import this file

    # torch's compiler would take minutes for all kinds: graphs are run as they are traced.
    compile_fx.compile_fx = lambda graph, examples, **options: graph  # type: ignore[assignment]
    # Each process on its own from here: neither waits for the other.
    for kind in list(cells)[dist.get_rank() :: dist.get_world_size()]:
        for name, column in COMPILED.items():
            torch.manual_seed(0)
            cells[kind][name] = cell(KINDS[kind], column)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(cells))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
