"""Two processes, FullySharded: callbacks that read modules, runs that end before their last step."""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import nestor
from nestor.callbacks import BestWeights, Callback, Checkpoint

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
SHARDED = nestor.FullySharded(timeout=5)
RANK = dist.get_rank()
dist.barrier()  # both have started
FOLDER = Path(sys.argv[1])
found: dict[str, Any] = {}


class Each(Callback):
    """Calls a function after every step."""

    def __init__(self, action: Callable[[Any], object]) -> None:
        self.action = action

    def on_step(self, engine: Any) -> None:
        self.action(engine)


def make(*callbacks: Callback, runtime: Any = SHARDED, **options: Any) -> tuple[nestor.Engine, nn.Module]:
    torch.manual_seed(0)
    net, w, x = nn.Linear(3, 1), nestor.Variable(torch.zeros(3)), torch.randn(8, 3)

    def fit(batch: Tensor, net: Any, w: Any) -> Tensor:
        return (net(batch * w().exp()) - 1).square().mean()

    program = nestor.Program(
        net=nestor.Problem(net, fit, data=[x], optimizer=torch.optim.Adam(net.parameters(), lr=0.1)),
        w=nestor.Problem(
            w, lambda batch, net: net(batch).mean(), data=[x], optimizer=torch.optim.SGD(w.parameters(), lr=0.1)
        ),
    )
    return nestor.Engine(program, runtime=runtime, seed=0, callbacks=callbacks, **options), net


def values(net: nn.Module) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).tolist()


def same(net: nn.Module, steps: int) -> bool:
    """Whether a module is as after some steps in one process."""
    engine, whole = make(runtime=nestor.SingleDevice())
    engine.run(steps)
    return bool(torch.allclose(torch.tensor(values(net)), torch.tensor(values(whole)), rtol=0, atol=1e-12))


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except BaseException as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return ""


def validate(net: Any) -> dict[str, Tensor]:
    return {"error": (net.weight.sum() - 0.3).square()}


# Best weights, copied during the run and restored at its end.
best = BestWeights("error", restore=True)
engine, net = make(best, validate=validate, validate_every=2)
engine.run(12)
assert best.best_step is not None
found["best"] = same(net, best.best_step)
found["best is early"] = best.best_step < 12
engine.run(2)  # goes on from the restored values
found["again"] = engine.step

# A callback that reads a module during the run: a named error, or the whole module.
engine, net = make(Each(lambda engine: net.weight.sum()))
found["read"] = error_of(lambda: engine.run(3))
found["module after the error"] = same(net, 1)
average = torch.zeros(4)


def update(engine: Any) -> None:
    with engine.runtime.whole_modules():
        average.mul_(0.5).add_(torch.tensor(values(net)), alpha=0.5)


engine, net = make(Each(update))
engine.run(4)
expected = torch.zeros(4)
alone, whole = make(Each(lambda _: expected.mul_(0.5).add_(torch.tensor(values(whole)), alpha=0.5)), runtime=None)
alone.run(4)
found["average"] = bool(torch.allclose(average, expected, rtol=0, atol=1e-12))


# All processes are interrupted.
def interrupt(engine: Any) -> None:
    if engine.step == 3:
        raise KeyboardInterrupt


engine, net = make(Each(interrupt))
found["interrupted"] = [error_of(lambda: engine.run(5)), same(net, 3)]
engine.callbacks = ()
engine.run(2)
found["goes on"] = same(net, 5)

# A signal reaches one process: all save the same step, soon, and end.
engine, net = make(
    Each(lambda engine: os.kill(os.getpid(), signal.SIGTERM) if RANK and engine.step == 2 else None),
    Checkpoint(FOLDER / "run", every=100),
)
found["signalled"] = [error_of(lambda: engine.run(900)), engine.step, same(net, engine.step)]

# One process fails alone: it ends, the other one waits for the timeout, and neither reads memory that is not there.
begin = time.time()
engine, net = make(Each(lambda engine: interrupt(engine) if RANK else None))
found["alone"] = error_of(lambda: engine.run(9))
found["seconds"] = time.time() - begin
found["after alone"] = [error_of(lambda: values(net)), error_of(net.state_dict)]
(FOLDER / f"{RANK}.json").write_text(json.dumps(found))
os._exit(0)  # the process group cannot be closed together
