"""Averages of the variables on shards and on replicas, compared with those of one process."""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import finish
from safetensors.torch import load_file
from torch import Tensor, nn

import nestor
from nestor.callbacks import EMA, SaveWeights

torch.set_num_threads(1)


def build(runtime: nestor.Runtime | None, folder: Path) -> tuple[nestor.Engine, EMA, list[Tensor]]:
    torch.manual_seed(0)
    net, weights = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(3).double())
    x = torch.randn(8, 3).double()

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        return (net(batch * weights().exp()) - 1).square().mean()

    program = nestor.Program(
        net=nestor.Problem(net, train, data=[x], optimizer=torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)),
        weights=nestor.Problem(
            weights,
            lambda batch, net: (net(batch) - 1).square().mean(),
            data=[x.flip(1)],
            optimizer=torch.optim.Adam(weights.parameters(), 0.1),
        ),
    )
    seen: list[Tensor] = []

    def validate(net: nn.Linear) -> float:
        seen.append(net.weight.detach().clone())
        return 0.0

    ema = EMA(0.8, validate=True)
    engine = nestor.Engine(
        program,
        runtime=runtime,
        callbacks=[ema, SaveWeights(folder, average=ema)],
        validate=validate,
        validate_every=4,
        seed=0,
    )
    return engine, ema, seen


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def weights_of(engine: nestor.Engine) -> list[Tensor]:
    return [p.detach().clone() for level in engine.program.levels.values() for p in level.problem.module.parameters()]


def averages_of(ema: EMA) -> list[Tensor]:
    return [p.detach() for name in ("net", "weights") for p in ema.module(name).parameters()]


def by_name(ema: EMA) -> list[Tensor]:
    return [t for name in ("net", "weights") for _, t in sorted(ema.module(name).state_dict().items())]


RANK = int(os.environ["RANK"])
plain, plain_ema, plain_seen = build(None, Path(sys.argv[1]) / f"plain {RANK}")
plain.run(8)
plain_state = copy.deepcopy(plain.state_dict())
plain.run(4)
errors = {}
for kind, runtime in (("sharded", nestor.FullySharded()), ("replicated", nestor.DataParallel())):
    engine, ema, seen = build(runtime, Path(sys.argv[1]) / kind)
    engine.run(12)
    dist.barrier()  # the first process writes the files
    errors[f"{kind}, validated"] = distance(seen, plain_seen)
    errors[f"{kind}, module"] = distance(averages_of(ema), averages_of(plain_ema))
    files = [load_file(Path(sys.argv[1]) / kind / f"{name}.safetensors") for name in ("net", "weights")]
    errors[f"{kind}, written"] = distance([v for f in files for _, v in sorted(f.items())], by_name(plain_ema))
    resumed, resumed_ema, _ = build(runtime, Path(sys.argv[1]) / kind)
    resumed.load_state_dict(copy.deepcopy(plain_state))
    resumed.run(4)
    errors[f"{kind}, resumed"] = distance(averages_of(resumed_ema), averages_of(plain_ema))
    ema.apply(engine)
    errors[f"{kind}, applied"] = distance(weights_of(engine), averages_of(plain_ema))
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(errors))
finish()
