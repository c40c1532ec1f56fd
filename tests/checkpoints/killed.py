"""Ten kinds of programs that end at a given step, however often they are killed: ``main(kind, folder, steps)``."""

import copy
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nestor

KINDS = (
    *("t1t2", "unrolled tree", "warm conjugate gradients", "tasks and episodes", "f2sa", "fp16", "compile"),
    *("workers", "stateful loader", "hugging face streaming"),
)


class Pause(nestor.callbacks.Callback):
    """Makes steps long enough that a kill hits them; not due, so that compiled cycles stay whole."""

    def is_due(self, engine: Any, step: int) -> bool:
        return False

    def on_step(self, engine: Any) -> None:
        time.sleep(0.002)


def bilevel(kind: str) -> nestor.Program:
    dtype = torch.float32 if kind in ("fp16", "compile") else torch.float64
    torch.manual_seed(0)
    x, y = torch.randn(64, 5, dtype=dtype), torch.randn(64, dtype=dtype)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    w = nestor.Variable(torch.full((5,), -2.0, dtype=dtype))

    def unpacked(batch: Any) -> tuple[Tensor, Tensor]:
        return (batch["x"].to(dtype), batch["y"].to(dtype)) if isinstance(batch, dict) else batch

    def train(batch: Any, net: Any, w: Any) -> Tensor:
        x, y = unpacked(batch)
        penalty = sum(p.square().sum() for p in net.parameters())
        return F.mse_loss(net(x * torch.sigmoid(w())).squeeze(1), y) + 0.1 * penalty

    def judge(batch: Any, net: Any) -> Tensor:
        x, y = unpacked(batch)
        return F.mse_loss(net(x).squeeze(1), y)

    rows = TensorDataset(x, y)
    response: nestor.Response | None = {
        "unrolled tree": nestor.Unrolled(checkpoint="tree"),
        "compile": nestor.Unrolled(),
        "warm conjugate gradients": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4), warm_start=True),
        "f2sa": None,
    }.get(kind, nestor.T1T2())
    plain = torch.optim.SGD(net.parameters(), 0.01)
    optimizer = plain if kind == "f2sa" else torch.optim.Adam(net.parameters(), 0.01)
    scheduled = kind not in ("compile", "f2sa")
    return nestor.Program(
        net=nestor.Problem(
            net,
            train,
            data=loader(kind, rows, x, y),
            optimizer=optimizer,
            unroll_steps=4,
            response=response,
            reformulation=nestor.F2SA() if kind == "f2sa" else None,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50) if scheduled else None,
        ),
        w=nestor.Problem(
            w,
            judge,
            data=DataLoader(rows, batch_size=16, shuffle=True),
            optimizer=torch.optim.Adam(w.parameters(), 0.05),
        ),
    )


def loader(kind: str, rows: Any, x: Tensor, y: Tensor) -> Any:
    if kind == "workers":
        generator = torch.Generator().manual_seed(1)
        return DataLoader(rows, batch_size=16, shuffle=True, num_workers=2, generator=generator)
    if kind == "stateful loader":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(rows, batch_size=16, shuffle=True)
    if kind == "hugging face streaming":
        import datasets

        table = datasets.Dataset.from_dict({"x": x.tolist(), "y": y.tolist()}).with_format("torch")
        return DataLoader(table.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=10), batch_size=16)
    return DataLoader(rows, batch_size=16, shuffle=True)


class Tasks:
    """Episodes of three tasks, from torch's global generator."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(7):
            a = torch.randn(3, 4, 5, dtype=torch.float64)
            yield (a, a.sum(-1, keepdim=True)), (a.flip(0), a.flip(0).sum(-1, keepdim=True))


def meta() -> nestor.Program:
    torch.manual_seed(0)
    start = nn.Linear(5, 1, dtype=torch.float64)
    fast, episodes = copy.deepcopy(start), nestor.Episodes(Tasks(), steps=3)

    def fit(batch: Any, fast: Any) -> Tensor:
        return F.mse_loss(fast(batch[0]), batch[1])

    return nestor.Program(
        fast=nestor.Problem(
            fast,
            fit,
            data=episodes.support,
            optimizer=torch.optim.SGD(fast.parameters(), 0.1, momentum=0.5),
            init="start",
            tasks=3,
            unroll_steps=3,
            response=nestor.Unrolled(),
        ),
        start=nestor.Problem(start, fit, data=episodes.query, optimizer=torch.optim.Adam(start.parameters(), 0.01)),
    )


def main(kind: str, folder: Path, steps: int) -> None:
    """Start the run or go on; write the weights at the end."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers; this process was forked by a server
    warnings.simplefilter("ignore")
    program = meta() if kind == "tasks and episodes" else bilevel(kind)
    engine = nestor.Engine(
        program,
        seed=5,
        precision="fp16" if kind == "fp16" else "fp32",
        compile=kind == "compile",
        callbacks=[
            Pause(),
            nestor.callbacks.JSONLines(folder / "metrics.jsonl", every=1 if kind != "compile" else 4),
            nestor.callbacks.Checkpoint(folder / "checkpoints", every=8, keep=2),
        ],
    )
    engine.run(steps, resume="latest")
    torch.save([p.detach() for level in program.levels.values() for p in level.parameters], folder / "final.pt")
