"""Run under torchrun: a preconditioner that reads the largest entry, and responses that move single entries."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ending import finish
from torch import Tensor

import nestor

SCALES = torch.tensor([1.0, 3.0, 10.0, 30.0, 100.0], dtype=torch.float64)


def run(runtime: nestor.Runtime, response: nestor.Response) -> Tensor:
    """The upper variables after a few steps."""
    theta = nestor.Variable(torch.zeros(5, dtype=torch.float64))
    weights = nestor.Variable(torch.arange(3.0, dtype=torch.float64))
    mix = torch.arange(15.0, dtype=torch.float64).view(5, 3).sin()
    program = nestor.Program(
        theta=nestor.Problem(
            theta,
            lambda theta, weights: (SCALES * (theta() - mix @ weights()).square()).sum() + theta().sum() ** 2,
            optimizer=torch.optim.SGD(theta.parameters(), lr=1e-3),
            response=response,
        ),
        weights=nestor.Problem(
            weights, lambda theta: (theta() - 1).square().sum(), optimizer=torch.optim.SGD(weights.parameters(), lr=0.1)
        ),
    )
    nestor.Engine(program, runtime=runtime, seed=0).run(4)
    return weights.value.detach()


def refusal(response: nestor.Response) -> str:
    """The error of an engine."""
    try:
        run(nestor.FullySharded(), response)
    except nestor.UnsupportedError as error:
        return str(error)
    return ""


def main(output: Path) -> None:
    """Compare with one process."""
    diagonal = nestor.HutchinsonDiagonal(samples=4, floor=0.2)
    response = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=2, rtol=0.0, preconditioner=diagonal))
    whole, sharded = run(nestor.SingleDevice(), response), run(nestor.FullySharded(), response)
    result = {
        "error": ((sharded - whole).norm() / whole.norm()).item(),
        "refusals": [refusal(nestor.ForwardUnrolled()), refusal(nestor.EvolutionStrategies(samples=2))],
    }
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
