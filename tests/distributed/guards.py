"""Two processes: what a run checks in one process, it checks on shards and on shares of the rows."""

import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import finish
from torch import Tensor, nn
from torch.optim import SGD

import nestor
from nestor import Problem, Program, Variable
from nestor.callbacks import Callback

torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
RANK = dist.get_rank()
DATA = torch.linspace(-1, 1, 12).view(4, 3)
OWN = torch.Generator().manual_seed(0)
clock = [0]


class AfterStep(Callback):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def on_level_step(self, run: Any, level: str) -> None:
        if level == "net":
            self.function(run)


def plain(batch: Tensor, net: nn.Module, w: Variable) -> Tensor:
    return ((net(batch) - w()) ** 2).mean() + 0.1 * w().sum()


def drawn(batch: Tensor, net: nn.Module, w: Variable) -> Tensor:
    """Only the second process draws."""
    return plain(batch, net, w) * (1 + torch.rand((), generator=OWN) if RANK else 1)


def timed(batch: Tensor, net: nn.Module, w: Variable) -> Tensor:
    return plain(batch, net, w) / (1 + clock[0])


def tick(run: Any) -> None:
    clock[0] += 1


def project(run: Any) -> None:
    with run.runtime.whole_modules(), torch.no_grad():
        run.states["net"].level.problem.module[0].bias.clamp_(-0.01, 0.01)


def reset(run: Any) -> None:
    """Set the momentum to zero after the second of three steps, and later on after others."""
    clock[0] += 1
    if clock[0] % 4 == 2:
        for slot in run.states["net"].level.problem.optimizer.state.values():
            slot["momentum_buffer"].zero_()


def freeze(run: Any) -> None:
    run.states["net"].level.problem.module[0].bias.requires_grad_(False)


def keep_data(net: Any) -> None:
    """Keep a tensor that shares the memory of a parameter, as hooks of old weight normalizations do."""
    net[0].old = net[0].weight.data


def touch(run: Any) -> None:
    with torch.no_grad():
        run.states["net"].level.problem.module[0].bias.clamp_(-0.01, 0.01)


def outcome(
    runtime: Any,
    loss: Any,
    response: nestor.Response,
    after: Callable[[Any], Any] | None = None,
    prepare: Callable[[nn.Module], Any] = lambda net: None,
) -> str:
    torch.manual_seed(1)
    clock[0] = 0
    net, w = nn.Sequential(nn.Linear(3, 1), nn.Dropout()), Variable(torch.ones(1))
    program = Program(
        net=Problem(
            net, loss, data=[DATA], optimizer=SGD(net.parameters(), 0.1, 0.5), unroll_steps=3, response=response
        ),
        w=Problem(w, lambda batch, net: (net(batch) ** 2).mean(), data=[DATA], optimizer=SGD(w.parameters(), 0.1)),
    )
    callbacks = [] if after is None else [AfterStep(after)]
    engine = nestor.Engine(program, seed=0, runtime=runtime, callbacks=callbacks)
    prepare(net)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.run(6)
    except nestor.NestorError as error:
        return f"{type(error).__name__}: {error}"
    return "; ".join(str(w.message) for w in caught)


found: dict[str, dict[str, str]] = {}
for name, make in {"data": nestor.DataParallel, "sharded": nestor.FullySharded}.items():
    found[name] = {
        "plain": outcome(make(), plain, nestor.Unrolled()),
        "drawn": outcome(make(), drawn, nestor.T1T2()),
        "timed": outcome(make(), timed, nestor.Unrolled(), tick),
        "timed, forward": "" if name == "sharded" else outcome(make(), timed, nestor.ForwardUnrolled(), tick),
        "projected": outcome(make(), plain, nestor.Unrolled(), project),
        "reset": outcome(make(), plain, nestor.Unrolled(), reset),
        "frozen": outcome(make(), plain, nestor.T1T2(), freeze),
        "projected, not replayed": outcome(make(), plain, nestor.T1T2(), project),
        "touched": outcome(make(), plain, nestor.T1T2(), touch),
        "kept": outcome(make(), plain, nestor.T1T2(), prepare=keep_data),
        "hooked": outcome(
            make(), plain, nestor.T1T2(), prepare=lambda net: net[0].bias.register_hook(torch.zeros_like)
        ),
        "asleep": outcome(make(), plain, nestor.T1T2(), prepare=lambda net: net.eval()),
    }
(Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(found))
finish()
