"""Run under torchrun: a network with a checkpointed block against the same network without; writes errors."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ending import finish
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nestor

RESPONSES: dict[str, nestor.Response] = {
    "t1t2": nestor.T1T2(),
    "t1t2-forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "difference": nestor.FiniteDifference(),
    "difference-reused": nestor.FiniteDifference(reuse=True),
    "sama": nestor.SAMA(),
    "cg": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5, rtol=0.0), damping=40.0),
    "neumann": nestor.Implicit(solver=nestor.Neumann(num_terms=4, step_size=0.1)),
    "unrolled-step": nestor.Unrolled(),
    "unrolled-sqrt": nestor.Unrolled(checkpoint="sqrt"),
    "unrolled-tree": nestor.Unrolled(checkpoint="tree"),
    "unrolled-none": nestor.Unrolled(checkpoint="none"),
}

# From 65,536 variables on, differences and SAMA reuse the memory of their vectors.
LARGE = ["difference", "difference-reused", "sama"]


class Net(nn.Module):
    """A network with a block that the backward pass evaluates again if ``checkpointed``."""

    def __init__(self, width: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.2)
        self.checkpointed = checkpointed
        self.evaluations = 0

    def block(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.tanh(self.second(self.dropout(torch.tanh(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.last(hidden)


def run(
    runtime: nestor.Runtime, response: nestor.Response, width: int, *, checkpointed: bool
) -> tuple[list[Tensor], int]:
    """Learn a shift of the inputs; return the variables of both levels and the evaluations of the block."""
    torch.manual_seed(0)
    x, y, xv, yv = (torch.randn(8, n) for n in (5, 1, 5, 1))
    net, shift = Net(width, checkpointed=checkpointed), nestor.Variable(torch.zeros(5))

    def lower(batch: list[Tensor], net: nn.Module, shift: nn.Module) -> Tensor:
        return (net(batch[0] + shift()) - batch[1]).square().mean()

    def upper(batch: list[Tensor], net: nn.Module) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1])

    program = nestor.Program(
        net=nestor.Problem(
            net,
            lower,
            data=[(x, y)],
            response=response,
            unroll_steps=3,
            optimizer=torch.optim.AdamW(net.parameters(), lr=0.01),
        ),
        shift=nestor.Problem(shift, upper, data=[(xv, yv)], optimizer=torch.optim.SGD(shift.parameters(), lr=0.1)),
    )
    nestor.Engine(program, runtime=runtime, seed=0).run(6)
    assert shift().abs().max() > 0
    return [p.detach().clone() for p in (*net.parameters(), *shift.parameters())], net.evaluations


def main(output: Path) -> None:
    """Compare every response under both runtimes."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    errors: dict[str, float] = {}
    for name, width in [*((name, 7) for name in RESPONSES), *((name, 300) for name in LARGE)]:
        for runtime in (nestor.DataParallel(), nestor.FullySharded()):
            plain, once = run(runtime, RESPONSES[name], width, checkpointed=False)
            other, twice = run(type(runtime)(), RESPONSES[name], width, checkpointed=True)
            assert twice > once
            norms = torch.stack([(a - b).norm() / a.norm() for a, b in zip(plain, other, strict=True)])
            errors[f"{name}/{width}/{type(runtime).__name__}"] = norms.max().item()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
