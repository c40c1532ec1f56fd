"""A run whose loaders have workers: the test signals the whole process group.

Usage: signalled.py FOLDER KIND; KIND is "processes" under torchrun.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nestor

warnings.simplefilter("ignore")
torch.set_num_threads(1)


def slow(rows: list[Tensor]) -> Tensor:
    time.sleep(0.02)
    return torch.stack(rows)


def endless(loader: DataLoader[Any]) -> Iterator[Tensor]:
    while True:
        yield from loader


def main(folder: Path, kind: str) -> None:
    def loader() -> Any:
        spawned = {"multiprocessing_context": "spawn"} if kind == "spawn" else {}
        made: DataLoader[Any] = DataLoader(
            torch.randn(64, 3),
            batch_size=4,
            num_workers=1 if spawned else 2,
            # With two processes few forks: CPython 3.11 may hang at a fork beside gloo's threads.
            persistent_workers=kind in ("spawn", "kept", "processes"),
            collate_fn=slow,
            **spawned,
        )
        return endless(made) if kind == "generator" else made

    net, w = nn.Linear(3, 1), nestor.Variable(torch.zeros(3))
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda batch, net, w: net(batch * w()).square().mean(),
            data=loader(),
            optimizer=torch.optim.SGD(net.parameters(), 0.1),
        ),
        w=nestor.Problem(
            w, lambda batch, net: net(batch).mean(), data=loader(), optimizer=torch.optim.SGD(w.parameters(), 0.1)
        ),
    )
    saver = nestor.callbacks.Checkpoint(folder, every=10)
    runtime = nestor.DataParallel() if kind == "processes" else nestor.SingleDevice()
    engine = nestor.Engine(program, seed=0, check=False, callbacks=[saver], runtime=runtime)
    try:
        engine.run(100_000)
    except SystemExit as error:
        (folder / f"ended-{runtime.rank}").write_text(f"{error.code} {engine.step}")
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
