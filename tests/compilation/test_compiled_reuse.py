"""Compiled steps keep no graph of a step: T1T2(reuse=True) is computed anew, at the same point."""

from typing import Any

import torch
from torch import Tensor, nn

import nestor


def weights(*, compile: bool) -> tuple[Tensor, dict[str, str]]:
    torch.manual_seed(0)
    net, w = (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double(),
        nestor.Variable(torch.zeros(12).double()),
    )
    x, y = torch.randn(12, 4).double(), torch.randn(12, 1).double()

    def fit(batch: Any, net: Any, w: Any) -> Tensor:
        return (torch.sigmoid(w()) * (net(batch[0]) - batch[1]).square().squeeze(1)).mean()

    program = nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            data=[(x, y), (x.flip(0), y)],
            optimizer=torch.optim.SGD(net.parameters(), 0.1, 0.9),
            unroll_steps=3,
            response=nestor.T1T2(reuse=True),
        ),
        w=nestor.Problem(
            w,
            lambda batch, net: (net(batch[0]) - batch[1]).square().mean(),
            data=[(x.flip(1), y)],
            optimizer=torch.optim.SGD(w.parameters(), 1.0),
        ),
    )
    engine = nestor.Engine(program, seed=0, compile=compile)
    engine.run(12)
    return w.value.detach().clone(), dict(engine.eager_reasons)


def test_compiled_equals_eager() -> None:
    """Whole cycles; the eager run takes the kept graphs, and another point would differ by far more than rounding."""
    eager, _ = weights(compile=False)
    compiled, reasons = weights(compile=True)
    assert reasons == {}
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)
