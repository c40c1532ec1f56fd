"""Two processes: what only they can refuse, and that all of them raise the same error before the first step."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import finish
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nestor
from nestor import Problem, Program, Variable

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
DATA = TensorDataset(torch.linspace(-1, 1, 48).view(16, 3), torch.arange(16))
seen: set[int] = set()


def fit(batch: tuple[Tensor, Tensor], net: nn.Module, w: Variable) -> Tensor:
    seen.update(batch[1].tolist())
    return net(batch[0]).square().mean() * w().exp()


def program(net: nn.Module, sampler: Any = None) -> Program:
    w = Variable(torch.zeros(()))
    loader = DataLoader(DATA, 4, sampler=sampler)
    return Program(
        net=Problem(net, fit, data=loader, optimizer=SGD(net.parameters(), lr=0.1)),
        w=Problem(w, lambda net, w: net(DATA.tensors[0]).mean() + w().square(), optimizer=SGD(w.parameters(), lr=0.1)),
    )


def error_of(action: Any) -> str:
    try:
        action()
    except nestor.UnsupportedError as error:
        return str(error)
    return ""


found: dict[str, Any] = {
    "DDP": error_of(lambda: program(DistributedDataParallel(nn.Linear(3, 1)))),
    "FSDP": error_of(lambda: program(fully_shard(nn.Linear(3, 1), mesh=init_device_mesh("cpu", (2,))))),
}
for name, runtime in {"DataParallel": nestor.DataParallel(), "FullySharded": nestor.FullySharded()}.items():
    split = program(nn.Linear(3, 1), DistributedSampler(DATA))
    found[name] = error_of(lambda split=split, runtime=runtime: nestor.Engine(split, seed=0, runtime=runtime))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    nestor.Engine(program(nn.Linear(3, 1), DistributedSampler(DATA)), seed=0)
found["alone"] = [str(warning.message) for warning in caught if issubclass(warning.category, nestor.NestorWarning)]

assert not seen
torch.manual_seed(0)
nestor.Engine(program(nn.Linear(3, 1)), seed=0, runtime=nestor.DataParallel()).run(4)
parts: list[Any] = [None, None]
dist.all_gather_object(parts, sorted(seen))
found["seen"] = parts
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
finish()
