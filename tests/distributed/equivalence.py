"""Run under torchrun: every response under every runtime against one process with the whole batch; writes errors."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ending import finish
from torch import Tensor, nn

import nestor

RESPONSES: dict[str, nestor.Response] = {
    "t1t2": nestor.T1T2(),
    "t1t2-forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "fd": nestor.FiniteDifference(rel_step=1e-2),
    "sama": nestor.SAMA(),
    "cg": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=6, rtol=1e-12)),
    "cg-warm": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=2, rtol=1e-12), warm_start=True),
    "neumann": nestor.Implicit(solver=nestor.Neumann(num_terms=5, step_size=0.05)),
    "minres": nestor.Implicit(solver=nestor.MINRES(max_steps=6, rtol=1e-12)),
    "gmres-fixed-point": nestor.Implicit(solver=nestor.GMRES(max_steps=6, rtol=1e-12), condition=nestor.FixedPoint()),
    "unrolled": nestor.Unrolled(),
    "unrolled-tree": nestor.Unrolled(checkpoint="tree"),
    "dense": nestor.Implicit(solver=nestor.DenseSolve(), damping=0.1),
    "nystrom": nestor.Implicit(solver=nestor.Nystrom(rank=5, rho=0.1)),
}


def bilevel(response: nestor.Response | None, rows: int = 8, **options: Any) -> nestor.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # 20 + 6 variables: odd shapes, an unused one
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    weights = nestor.Variable(torch.linspace(-1, 1, 24))
    x, y = torch.randn(24, 3), torch.randn(24)

    def train(batch: Any, net: Any, weights: Any) -> Tensor:
        x, y, index = batch
        used = [p for n, p in net.named_parameters() if n != "unused"]
        decay = 0.5 * sum(p.square().sum() for p in used)
        return (torch.sigmoid(weights()[index]) * (net(x).squeeze(1) - y) ** 2).mean() + decay

    def valid(batch: Any, net: Any, weights: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(net(x).squeeze(1), y) + 0.01 * weights().square().mean()

    data = torch.utils.data.TensorDataset(x, y, torch.arange(24))
    return nestor.Program(
        net=nestor.Problem(
            net,
            train,
            data=torch.utils.data.DataLoader(data, batch_size=rows, shuffle=True),
            optimizer=torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1),
            unroll_steps=2,
            clip_norm=0.7,
            response=response,
            **options,
        ),
        weights=nestor.Problem(
            weights,
            valid,
            data=[(x.flip(1), y)],
            optimizer=torch.optim.SGD(weights.parameters(), lr=0.1, momentum=0.9),
        ),
    )


def trilevel(response: nestor.Response, nesting: str, clip_norm: float | None = None) -> nestor.Program:
    torch.manual_seed(1)
    a, b, c = (nestor.Variable(0.3 * torch.randn(n)) for n in (5, 3, 2))
    couple, other = torch.randn(8, 5), torch.randn(8, 3)
    mix, mixed = torch.randn(5, 3), torch.randn(3, 2)

    def low(batch: Any, a: Any, b: Any, c: Any) -> Tensor:
        return (
            ((batch @ (a() - torch.tanh(mix @ b()))) ** 2).mean()
            + (a() ** 4).sum() * 0.1
            + (c().exp().sum() * a() ** 2).sum()
        )

    def mid(batch: Any, a: Any, b: Any, c: Any) -> Tensor:
        return ((batch @ (b() - mixed @ c())) ** 2).mean() + torch.sin(a()).sum() * 0.1 + b().square().sum()

    def top(a: Any, b: Any, c: Any) -> Tensor:
        return (b() ** 2).sum() + (a() ** 2).sum() + 0.1 * (c() ** 2).sum()

    return nestor.Program(
        nesting=nesting,
        a=nestor.Problem(
            a,
            low,
            data=[couple],
            optimizer=torch.optim.SGD(a.parameters(), 0.05),
            unroll_steps=2,
            response=response,
            clip_norm=clip_norm,
        ),
        b=nestor.Problem(b, mid, data=[other], optimizer=torch.optim.Adam(b.parameters(), 0.02), response=response),
        c=nestor.Problem(c, top, optimizer=torch.optim.SGD(c.parameters(), 0.02)),
    )


def trajectory(program: nestor.Program, runtime: nestor.Runtime | None, steps: int = 20) -> list[Tensor]:
    """Return the metrics and the whole variables at the end of a run."""
    engine = nestor.Engine(program, runtime=runtime, seed=3)
    metrics = engine.run(steps)
    values = [torch.tensor([metrics[key] for key in sorted(metrics)])]
    for level in engine.program.levels.values():
        values += [t.clone() for t in level.gather([p.detach() for p in level.parameters]) if t is not None]
    return values


def main(output: Path) -> None:
    """Compare everything."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    runtimes: dict[str, Any] = {"data": nestor.DataParallel, "sharded": nestor.FullySharded}
    if size == 4:
        runtimes["mesh"] = lambda: nestor.FullySharded(mesh=(2, 2))
    cases: dict[str, Any] = {name: lambda r=r: bilevel(r) for name, r in RESPONSES.items()}
    cases["penalty"] = lambda: bilevel(None, reformulation=nestor.F2SA(multiplier=2.0))
    exact = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=30, rtol=1e-13))
    cases["trilevel-exact"] = lambda: trilevel(exact, "exact")
    cases["trilevel-t1t2-exact"] = lambda: trilevel(nestor.T1T2(), "exact")
    cases["trilevel-frozen"] = lambda: trilevel(exact, "frozen")
    cases["trilevel-unrolled"] = lambda: trilevel(nestor.Unrolled(), "exact")
    cases["trilevel-unrolled-clipped"] = lambda: trilevel(nestor.Unrolled(), "exact", clip_norm=0.3)
    errors: dict[str, float | str] = {}
    for name, make in cases.items():
        expected = trajectory(make(), None)
        for kind, runtime in runtimes.items():
            try:
                got = trajectory(make(), runtime())
            except Exception as error:
                errors[f"{name}/{kind}"] = f"{type(error).__name__}: {error}"
                continue
            pairs = list(zip(got, expected, strict=True))
            errors[f"{name}/{kind}"] = max(
                ((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs if b.numel()
            )
    if dist.get_rank() == 0:
        output.write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
