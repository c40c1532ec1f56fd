"""Two processes that disagree: each records the error of every case."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

import nestor
from nestor.callbacks import EarlyStopping, JSONLines, Throughput

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RUNTIME = nestor.DataParallel(timeout=5)
RANK = dist.get_rank()
dist.barrier()  # both have started
FOLDER = Path(sys.argv[1])


def engine(
    *,
    features: int = 3,
    dtype: Any = torch.float32,
    optimizer: Any = SGD,
    response: Any = None,
    unroll_steps: int = 1,
    rows: int = 16,
    batch_size: int = 4,
    level: str = "w",
    act: Callable[[], None] = lambda: None,
    runtime: Any = RUNTIME,
    seed: int | None = 0,
    **options: Any,
) -> nestor.Engine:
    torch.manual_seed(0)
    net, w = nn.Linear(features, 1, dtype=dtype), nestor.Variable(torch.zeros(features, dtype=dtype))

    def fit(batch: Tensor, net: Any, x: Any) -> Tensor:
        act()
        return net(batch * x().exp()).square().mean()

    program = nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            data=DataLoader(torch.ones(rows, features, dtype=dtype), batch_size),
            optimizer=optimizer(net.parameters(), lr=0.1),
            response=response,
            unroll_steps=unroll_steps,
            reads={"x": level},
        ),
        **{
            level: nestor.Problem(
                w,
                lambda batch, net: net(batch).mean(),
                data=[torch.ones(4, features, dtype=dtype)],
                optimizer=SGD(w.parameters(), lr=0.1),
            )
        },
    )
    return nestor.Engine(program, runtime=runtime, seed=seed, check=False, **options)


found: dict[str, str] = {}


def record(name: str, action: Callable[[], object]) -> None:
    begin = time.time()
    try:
        action()
        found[name] = "no error"
    except (nestor.errors.ProcessError, ValueError) as error:
        found[name] = f"{type(error).__name__}: {error}"
    assert time.time() - begin < 30


VALUES: dict[str, tuple[Any, Any]] = {
    "features": (3, 5),
    "dtype": (torch.float32, torch.float64),
    "optimizer": (SGD, Adam),
    "response": (None, nestor.Unrolled()),
    "unroll_steps": (1, 2),
    "rows": (16, 20),
    "level": ("w", "v"),
    "seed": (0, 1),
    "callbacks": ([], [EarlyStopping("net/loss")]),
    "precision": ("fp32", "bf16"),
    "runtime": (RUNTIME, nestor.FullySharded()),
}
for name, values in VALUES.items():
    record(name, lambda name=name, values=values: engine(**{name: values[RANK]}))
record("small batch", lambda: engine(rows=17))
record("steps", lambda: engine().run(3 + RANK))
record("other call", lambda: engine().run(2) if RANK else (engine(), engine()))
validate = {0: lambda net: {"a": 1.0, "b": 1.0}, 1: lambda net: {"a": 1.0, "c": 2.0}}[RANK]
record("validation", lambda: engine(validate=validate, validate_every=2).run(4))
file = [JSONLines(FOLDER / "log.jsonl"), Throughput()] if RANK == 0 else [Throughput()]
record("same", lambda: engine(callbacks=file).run(4))

# From here on the processes are out of step.
evaluations = 0


def hang() -> None:
    global evaluations
    evaluations += 1
    if RANK and evaluations == 3:
        time.sleep(14)


record("hanging", lambda: engine(act=hang).run(8))
if RANK == 0:
    record("absent", engine)
(FOLDER / f"{RANK}.json").write_text(json.dumps(found))
os._exit(0)  # the process group cannot be closed together
