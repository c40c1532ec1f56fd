"""A row of a batch becomes NaN in the third step; every process writes the step of its error."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ending import finish

import nestor

torch.set_num_threads(1)
runtime = nestor.DataParallel()
net = torch.nn.Linear(2, 1)
good, bad = torch.ones(4, 2), torch.ones(4, 2)
bad[3, 0] = float("nan")  # in the share of the second process
program = nestor.Program(
    net=nestor.Problem(
        net,
        lambda batch, net: net(batch).square().mean(),
        data=[good, good, bad],
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )
)
engine = nestor.Engine(program, runtime=runtime, seed=0)
engine.run(2)
before = net.weight.detach().clone()
result = {"step": 0, "unchanged": False}
try:
    engine.run(1)
except nestor.NonFiniteError as error:
    result = {"step": error.step, "unchanged": torch.equal(before, net.weight)}
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(result))
finish()
