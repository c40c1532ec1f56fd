"""Dataset distillation by nestor, by TorchOpt and with higher: ten images that are learned through ten steps.

The task is that of `examples/dataset_distillation.py`, smaller: ten images and their soft labels are learned, so that
a network of new weights that takes ten steps of gradient descent on them classifies real digits (MNIST). The rate of
these steps is fixed, 0.1. There are 80 updates, each with a new initial network and a batch of 256 real images. All
three libraries get the same initial networks and the same batches, and differentiate the ten steps.

Each library searches the rate of the upper level among the same three, for every seed, by the accuracy on 1,000
images held out. `accuracy` is the mean of three new networks, trained by the same code for all, on the 10,000 test
images. "Ten real images" is the start.

nestor keeps all graphs (`Unrolled(checkpoint="none")`), as the two others do. All compute the same derivative: in
double precision the images agree to 14 digits (`tests/gallery/test_peer_hypergradients.py`). In single precision
rounding errors grow, and after about 35 updates of rate 0.1 the images differ. Seconds are those of the three
trainings.
"""

from collections.abc import Callable
from statistics import fmean

import higher
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared import small_sets
from shared.bars import bars
from shared.data import images
from shared.experiment import Case, Experiment, main
from shared.same_draws import SameBatches, network_of
from shared.search import Trained, tuned
from shared.small_sets import Set

STEPS, UPDATES, RATE, RATES, BATCH, HELD_OUT, NETWORKS = 10, 80, 0.1, (0.02, 0.05, 0.1), 256, 1_000, 3


class Distilled(nn.Module):
    """Ten images and their soft labels."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(start.clone())
        self.logits = nn.Parameter(4.0 * torch.eye(len(start)))


def initial(seed: int, update: int) -> nn.Module:
    return network_of(small_sets.new_network, seed, update)


def distilled_loss(network: nn.Module, distilled: Distilled) -> Tensor:  # lower level
    return F.cross_entropy(network(distilled.images), distilled.logits.softmax(1))


def real_loss(batch: Set, network: nn.Module) -> Tensor:  # upper level
    inputs, labels = batch
    return F.cross_entropy(network(inputs), labels)


class Restart(nestor.callbacks.Callback):
    """Starts each inner loop from the next initial network."""

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.network, self.seed, self.updates = network, seed, 0

    def on_level_step(self, engine, level):
        if level == "distilled":
            self.updates += 1
            self.network.load_state_dict(initial(self.seed, self.updates).state_dict())


def rated(distilled: Distilled, updates: int, rate: float) -> tuple[Adam, CosineAnnealingLR]:
    optimizer = Adam(distilled.parameters(), lr=rate)
    return optimizer, CosineAnnealingLR(optimizer, updates)


def by_nestor(distilled: Distilled, real: SameBatches, updates: int, rate: float) -> None:
    network, (optimizer, schedule) = initial(real.seed, 0), rated(distilled, updates, rate)
    program = nestor.Program(
        network=nestor.Problem(network, distilled_loss, optimizer=SGD(network.parameters(), lr=RATE),
                               unroll_steps=STEPS, response=nestor.Unrolled(checkpoint="none")),
        distilled=nestor.Problem(distilled, real_loss, data=real, optimizer=optimizer, scheduler=schedule),
    )  # fmt: skip
    nestor.Engine(program, seed=real.seed, callbacks=[Restart(network, real.seed)]).run(updates * STEPS)


def torchopt_backward(distilled: Distilled, network: nn.Module, batch: Set) -> None:
    inner = torchopt.MetaSGD(network, lr=RATE)
    for _ in range(STEPS):
        inner.step(distilled_loss(network, distilled))
    real_loss(batch, network).backward()


def higher_backward(distilled: Distilled, network: nn.Module, batch: Set) -> None:
    with higher.innerloop_ctx(network, SGD(network.parameters(), lr=RATE)) as (fast, steps):
        for _ in range(STEPS):
            steps.step(distilled_loss(fast, distilled))
        real_loss(batch, fast).backward()


def by_loop(backward: Callable) -> Callable:
    def distil(distilled: Distilled, real: SameBatches, updates: int, rate: float) -> None:
        optimizer, schedule = rated(distilled, updates, rate)
        for update, batch in zip(range(updates), real, strict=False):
            optimizer.zero_grad()
            backward(distilled, initial(real.seed, update), batch)
            optimizer.step()
            schedule.step()

    return distil


METHODS = {"nestor": by_nestor, "TorchOpt": by_loop(torchopt_backward), "higher": by_loop(higher_backward)}


def run(case: Case) -> dict[str, float]:
    data = images.mnist(case.data)
    updates, unseen = (3, 500) if case.quick else (UPDATES, len(data.test))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(case.seed))
    held, real = ((data.train[part], data.train_labels[part]) for part in (order[:HELD_OUT], order[HELD_OUT:]))
    test = data.test[:unseen], data.test_labels[:unseen]
    start = torch.stack([real[0][real[1] == digit][0] for digit in range(10)])
    case.note(updates=updates, steps=STEPS, rate=RATE, rates=RATES, batch=BATCH, networks=NETWORKS)
    for name, distil in {"ten real images": lambda *_: None, **METHODS}.items():

        def trained(rate: float, distil=distil) -> Trained:
            distil(distilled := Distilled(start), SameBatches(*real, size=BATCH, seed=case.seed), updates, rate)
            torch.manual_seed(case.seed)
            chosen = distilled.images.detach(), distilled.logits.detach().softmax(1)
            ends = [small_sets.train(*chosen, RATE, STEPS) for _ in range(NETWORKS)]
            return Trained(*(fmean(small_sets.accuracy(end, *part) for end in ends) for part in (held, test)))

        tuned(case, name, (0.0,) if name == "ten real images" else RATES, trained)
    return {name: method.metrics["accuracy"] for name, method in case.methods.items()}


EXPERIMENT = Experiment("Dataset distillation, by nestor, TorchOpt and higher", run, bars("test accuracy (%)", 100),
                        metric="accuracy", ours="nestor", baselines=("TorchOpt", "higher"))  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
