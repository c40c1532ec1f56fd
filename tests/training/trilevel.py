"""A run with everything that a checkpoint has to carry; `python trilevel.py FOLDER STEPS` (resumes by itself)."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nestor


def build() -> nestor.Program:
    """Dropout, BatchNorm, momentum, Adam, a schedule, shuffled loaders, warm-started CG, an unrolled level."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 5).double(), torch.randn(64).double()
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1)).double()
    weights, shift = nestor.Variable(torch.zeros(64).double()), nestor.Variable(torch.zeros(2).double())

    def train(batch: Any, net: Any, weights: Any, shift: Any) -> Tensor:
        x, y, index = batch
        decay = 2.0 * sum(p.square().sum() for p in net.parameters())
        return (torch.sigmoid(weights()[index]) * (net(x).squeeze(1) - y - shift()[0]) ** 2).mean() + decay

    def middle(batch: Any, net: Any, weights: Any, shift: Any) -> Tensor:
        x, y, _ = batch
        return F.mse_loss(net(x).squeeze(1), y) + (weights() - shift()[1]).square().mean()

    def top(batch: Any, net: Any, weights: Any) -> Tensor:
        return F.mse_loss(net(batch[0]).squeeze(1), batch[1]) + weights().square().mean()

    def loader(seed: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(x, y, torch.arange(64)), batch_size=16, shuffle=True)

    sgd = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    adam = torch.optim.Adam(weights.parameters(), lr=0.05)
    kept = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=4, rtol=1e-8), warm_start=True)
    return nestor.Program(
        net=nestor.Problem(
            net,
            train,
            data=loader(1),
            optimizer=sgd,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(sgd, 0.999),
            unroll_steps=2,
            response=kept,
        ),
        weights=nestor.Problem(
            weights, middle, data=loader(2), optimizer=adam, unroll_steps=3, response=nestor.Unrolled()
        ),
        shift=nestor.Problem(
            shift, top, data=loader(3), optimizer=torch.optim.SGD(shift.parameters(), lr=0.1, momentum=0.5)
        ),
        nesting="frozen",
    )


def main(folder: Path, steps: int) -> None:
    """Run, or go on."""
    program = build()
    engine = nestor.Engine(
        program,
        seed=5,
        callbacks=[
            nestor.callbacks.JSONLines(folder / "metrics.jsonl"),
            nestor.callbacks.Checkpoint(folder / "checkpoints", every=7, keep=2),
        ],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        engine.run(steps, resume="latest")
    torch.save([p.detach() for level in program.levels.values() for p in level.parameters], folder / "final.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
