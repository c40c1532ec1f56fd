"""Bytes of parameters and optimizer states that a process holds, sharded and whole."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ending import finish

import nestor


def held(engine):
    total = 0
    for level in engine.program.levels.values():
        total += sum(p.untyped_storage().nbytes() for p in {*level.problem.module.parameters(), *level.parameters})
        for slot in level.problem.optimizer.state.values():
            total += sum(v.untyped_storage().nbytes() for v in slot.values() if isinstance(v, torch.Tensor))
    return total


def run(runtime):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    weights = nestor.Variable(torch.zeros(1000))
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda batch, net, weights: net(batch).square().mean() * weights().exp().mean(),
            data=[torch.randn(16, 64)],
            optimizer=torch.optim.Adam(net.parameters()),
        ),
        weights=nestor.Problem(
            weights,
            lambda batch, net: net(batch).mean(),
            data=[torch.randn(16, 64)],
            optimizer=torch.optim.Adam(weights.parameters()),
        ),
    )
    seen = []

    class Look(nestor.callbacks.Callback):
        def on_step(self, engine):
            seen.append(held(engine))

    def validate(net):
        return {"norm": net[0].weight.norm()}

    engine = nestor.Engine(program, runtime=runtime, seed=0, callbacks=[Look()], validate=validate, validate_every=1)
    metrics = engine.run(3)
    result = max(seen)
    # After the run the modules hold the trained weights; a second run starts from the weights in the modules.
    assert abs(metrics["validation/norm"] - net[0].weight.norm().item()) < 1e-6
    with torch.no_grad():
        net[0].weight.zero_()
    engine.run(1)
    assert net[0].weight.abs().max() < 0.1
    return result


torch.set_num_threads(1)
whole, sharded = run(nestor.DataParallel()), run(nestor.FullySharded())
if dist.get_rank() == 0:
    (Path(sys.argv[1]) / "bytes.json").write_text(json.dumps({"whole": whole, "sharded": sharded}))
finish()
