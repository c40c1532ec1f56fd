"""A small program of a user, for strict type checkers: every name that it takes from nestor has a type."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

Batch = tuple[Tensor, Tensor]


def train_loss(batch: Batch, net: nn.Module, decay: nestor.Variable) -> Tensor:
    x, y = batch
    penalty = sum((p.square().sum() for p in net.parameters()), torch.zeros(()))
    return F.cross_entropy(net(x), y) + decay().exp() * penalty


def validation_loss(batch: Batch, net: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y)


class Watch(nestor.callbacks.Callback):
    def on_step(self, engine: nestor.callbacks.Run) -> None:
        for name, value in engine.read_metrics().items():
            print(engine.step, name, round(value, 3))


def batches() -> Iterator[Batch]:
    while True:
        yield torch.randn(8, 3), torch.randint(0, 2, (8,))


def main() -> None:
    net, decay = nn.Linear(3, 2), nestor.Variable(torch.tensor(-3.0))
    program = nestor.Program(
        net=nestor.Problem(
            net,
            train_loss,
            data=batches(),
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            response=nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5), damping=0.1),
        ),
        decay=nestor.Problem(decay, validation_loss, data=batches(), optimizer=torch.optim.Adam(decay.parameters())),
    )
    runtimes: list[nestor.Runtime] = [nestor.SingleDevice()]
    if torch.distributed.is_initialized():
        runtimes = [nestor.DataParallel(timeout=60), nestor.FullySharded()]
    engine = nestor.Engine(program, callbacks=[Watch(), nestor.callbacks.EMA(0.9)], runtime=runtimes[0], seed=0)
    engine.run(3)
    value: Tensor = decay()
    batch = {"net": next(batches()), "decay": next(batches())}
    gradient: dict[str, Tensor] = program.hypergradient("decay", batch)
    theta: Tensor = nestor.best_response(lambda t, w: (t - w) ** 2, value.detach(), value, nestor.Implicit())
    print(program.explain(), gradient, theta, nestor.check_hypergradient(program, "decay", batch))


if __name__ == "__main__":
    main()
