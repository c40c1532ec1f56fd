"""Run under torchrun: computations on whole vectors are the same before, during and after a FullySharded run."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import finish
from torch import Tensor, nn

import nestor
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate

EXACT = {
    "dense": nestor.Implicit(solver=nestor.DenseSolve()),
    "cg": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4, rtol=0.0)),
}
RESPONSES = {**EXACT, "unrolled": nestor.Unrolled()}


def program(response: nestor.Response) -> nestor.Program:
    """Two lower levels; the shards of the first process have the same lengths in both."""
    torch.manual_seed(0)
    few, more = nestor.Variable(torch.randn(5)), nestor.Variable(torch.randn(6))
    weights = nestor.Variable(torch.randn(7))
    mix, batches = torch.randn(7, 11), [torch.randn(8, 11) for _ in range(3)]

    def lower(columns: slice) -> Any:
        def loss(batch: Tensor, theta: Tensor, weights: Tensor) -> Tensor:
            return (batch[:, columns] @ theta - torch.tanh(weights @ mix[:, columns]).sum()).square().mean()

        return loss

    first, second = lower(slice(0, 5)), lower(slice(5, 11))

    def optimizer(variable: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(variable.parameters(), lr=0.05)

    return nestor.Program(
        few=nestor.Problem(
            few,
            lambda batch, few, weights: first(batch, few(), weights()) + few().square().sum(),
            data=batches,
            optimizer=optimizer(few),
            unroll_steps=2,
            clip_norm=0.3,
            response=response,
        ),
        more=nestor.Problem(
            more,
            lambda batch, more, weights: second(batch, more(), weights()) + more().square().sum(),
            data=batches,
            optimizer=optimizer(more),
            unroll_steps=2,
            clip_norm=0.3,
            response=response,
        ),
        weights=nestor.Problem(
            weights,
            lambda few, more, weights: (few().sum() - 1) ** 2 + more().square().sum() + weights().square().sum(),
            optimizer=optimizer(weights),
            clip_norm=0.2,
        ),
    )


def run(runtime: nestor.Runtime, response: nestor.Response, callbacks: Any = ()) -> list[Tensor]:
    """The variables after a run, and its metrics, norms of gradients among them."""
    engine = nestor.Engine(program(response), runtime=runtime, seed=1, callbacks=list(callbacks))
    metrics = engine.run(8)
    values = [torch.tensor([metrics[key] for key in sorted(metrics)])]
    for level in engine.program.levels.values():
        values += [p.detach().clone() for p in level.problem.module.parameters()]
    return values


def responded(response: nestor.Response) -> list[Tensor]:
    """A gradient through ``best_response``."""
    torch.manual_seed(2)
    matrix, theta = torch.randn(9, 5), [torch.randn(3), torch.randn(2)]
    inputs = torch.randn(9, requires_grad=True)

    def objective(theta: list[Tensor], inputs: Tensor) -> Tensor:
        values = torch.cat(theta)
        return (matrix @ values - inputs.tanh()).square().sum() + values.square().sum()

    found = nestor.best_response(objective, theta, inputs, response)
    return list(torch.autograd.grad(sum(t.square().sum() for t in found), inputs))


def clipped() -> list[Tensor]:
    """A step with a clipped gradient, and the derivative of the step in the gradient."""
    theta, grads = [torch.zeros(3), torch.zeros(2)], [torch.arange(3.0) + 1, torch.ones(2)]
    rule = OptimizerUpdate.of(torch.optim.SGD(theta, lr=1.0), theta, clip_norm=0.5)
    probes = [g.requires_grad_() for g in grads]
    after = rule.differentiable_step(State(theta, [{}, {}]), probes, {}).params
    return [*after, *torch.autograd.grad(after[0].sum() + after[1].prod(), probes)]


def unsharded() -> dict[str, list[Tensor]]:
    """All computations on whole vectors that are compared."""
    found = {f"best_response/{name}": responded(response) for name, response in EXACT.items()}
    for name, response in RESPONSES.items():
        found[f"data/{name}"] = run(nestor.DataParallel(), response)
        found[f"single/{name}"] = run(nestor.SingleDevice(), response)
    return {**found, "clipped": clipped()}


class During(nestor.callbacks.Callback):
    """Computes on whole vectors within the run of another engine."""

    found: dict[str, list[Tensor]] | None = None

    def on_step(self, engine: nestor.Engine) -> None:
        if self.found is None:
            self.found = unsharded()


def differing(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> Iterator[str]:
    """Name the results that differ in any bit."""
    for name, values in expected.items():
        if not all(torch.equal(a, b) for a, b in zip(found[name], values, strict=True)):
            yield name


def main(output: Path) -> None:
    """Compare everything."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    before = unsharded()
    during = During()
    sharded = {name: run(nestor.FullySharded(), r, [during]) for name, r in RESPONSES.items()}
    after = unsharded()
    assert during.found is not None
    again = {name: run(nestor.FullySharded(), r) for name, r in RESPONSES.items()}
    errors = [
        ((a - b).norm() / b.norm()).item()
        for name in RESPONSES
        for a, b in zip(sharded[name], before[f"single/{name}"], strict=True)
    ]
    result = {
        "compared": len(before),
        "during": list(differing(during.found, before)),
        "after": list(differing(after, before)),
        "again": list(differing(again, sharded)),
        "error": max(errors),
    }
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
