"""The third step of Adam divides zero by zero in the last entry, which one process holds; every process reports."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import finish

import nestor

torch.set_num_threads(1)


def run(runtime: nestor.Runtime, keep: bool) -> dict[str, Any]:
    net = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.ones(1, 4))
    batch = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 4)
    adam = torch.optim.Adam(net.parameters(), 0.1)
    problem = nestor.Problem(net, lambda batch, net: net(batch).square().mean(), data=[batch], optimizer=adam)
    engine = nestor.Engine(nestor.Program(net=problem), runtime=runtime, seed=0, keep_last=keep)
    engine.run(2)
    before = net.weight.detach().clone()
    adam.param_groups[0]["eps"] = 0.0
    result: dict[str, Any] = {"step": 0}
    try:
        engine.run(1)
    except nestor.NonFiniteError as error:
        result = {"step": error.step, "lost": list(error.lost), "unchanged": torch.equal(before, net.weight)}
    try:
        engine.state_dict()
    except nestor.NonFiniteError:
        return {**result, "saved": False}
    return {**result, "saved": True}


results = {}
for keep in (False, True):
    results["sharded" + ", kept" * keep] = run(nestor.FullySharded(), keep)
    results["replicated" + ", kept" * keep] = run(nestor.DataParallel(), keep)
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(results))
finish()
