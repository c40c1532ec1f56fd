"""Differentiable architecture search (DARTS) by nestor and by Betty, on the same space, with the same steps.

The task is that of `examples/darts.py`, shorter: 160 steps of search, in the second half of which the logits of the
operations step after every second step of the weights, and 200 steps of training for the chosen network.
Fashion-MNIST at 14 x 14, 2,000 images for the weights and 2,000 for the logits; the chosen network is trained on
both.

Each library searches the rate of the logits among the same two, for every seed, by the accuracy of the chosen network
on 1,000 further images; `accuracy` is that on the 10,000 test images. "Uniform mixture" is the network with all
operations on every edge, trained as long as a chosen one.

Betty takes the derivative of the validation loss through the weights by finite differences ("darts"), with the
identity for the inverse Hessian. `T1T2()` of nestor is the same formula, exact: the hypergradients agree if the
difference is short. Its default length, 0.01, is used here; on a small random example in double precision it gave a
relative error of 2.8 (`tests/gallery/test_peer_hypergradients.py`). `T1T2(scale=0.1, reuse=True)` is that of the
paper, with the rate of the weights as its scale, at the weights before the last step; Betty has no such factor.
`FirstOrder()` leaves the derivative through the weights out. Seconds are those of both searches and the trainings of
their networks.
"""

import torch
import torch.nn.functional as F
from betty.configs import Config
from torch import Tensor
from torch.optim import Adam

import nestor
from shared.architecture_search import Clothes, accuracy, clothes, cosine, retrained
from shared.bars import bars
from shared.batches import Batches
from shared.betty_levels import BettyLevel, run_betty
from shared.cells import EDGES, OPERATIONS, CellNetwork, strongest
from shared.experiment import Case, Experiment, main
from shared.search import Trained, tuned

SEARCH, RETRAIN, PART, CHOICE, BATCH, UNROLL, RATE, RATES = 160, 200, 2_000, 1_000, 64, 2, 0.1, (0.03, 0.1)
RESPONSES = {
    "nestor, T1T2(scale=0.1, reuse=True)": nestor.T1T2(scale=RATE, reuse=True),
    "nestor, T1T2()": nestor.T1T2(),
    "nestor, FirstOrder()": nestor.FirstOrder(),
}


def mixed_loss(batch, network, logits) -> Tensor:  # of both levels, each on its own images
    images, labels = batch
    return F.cross_entropy(network(images, logits()), labels)


def start(seed: int) -> tuple[CellNetwork, nestor.Variable]:
    torch.manual_seed(seed)
    return CellNetwork(), nestor.Variable(torch.zeros(2 * len(EDGES), len(OPERATIONS)))


def logit_steps(logits: nestor.Variable, rate: float) -> Adam:
    return Adam(logits.parameters(), lr=rate, betas=(0.5, 0.999))


def nestor_program(data: Clothes, seed: int, steps: int, rate: float, response: nestor.Response) -> nestor.Program:
    network, logits = start(seed)
    return nestor.Program(
        network=nestor.Problem(network, mixed_loss, data=Batches(*data.train, size=BATCH), response=response,
                               unroll_steps=UNROLL, warmup_steps=steps // 2, **cosine(network, steps, RATE)),
        logits=nestor.Problem(logits, mixed_loss, data=Batches(*data.validation, size=BATCH),
                              optimizer=logit_steps(logits, rate)),
    )  # fmt: skip


def betty_levels(data: Clothes, seed: int, steps: int, rate: float) -> list[BettyLevel]:
    network, logits = start(seed)
    lower, upper = Config("darts", UNROLL, warmup_steps=steps // 2), Config(retain_graph=True)
    images, others = Batches(*data.train, size=BATCH), Batches(*data.validation, size=BATCH)
    return [
        BettyLevel("network", network, mixed_loss, data=images, config=lower, **cosine(network, steps, RATE)),
        BettyLevel("logits", logits, mixed_loss, data=others, config=upper, optimizer=logit_steps(logits, rate)),
    ]


def by_nestor(data: Clothes, seed: int, steps: int, rate: float, response: nestor.Response) -> Tensor:
    program = nestor_program(data, seed, steps, rate, response)
    nestor.Engine(program, seed=seed).run(steps)
    return program.levels["logits"].problem.module().detach()


def by_betty(data: Clothes, seed: int, steps: int, rate: float) -> Tensor:
    levels = betty_levels(data, seed, steps, rate)
    run_betty(levels, steps, seed)
    return levels[1].module().detach()


def run(case: Case) -> dict[str, float]:
    searching, training, part = (8, 4, 128) if case.quick else (SEARCH, RETRAIN, PART)
    drawn = clothes(case, part, part + CHOICE)
    (images, choice_images), (labels, choice_labels) = (values.split([part, CHOICE]) for values in drawn.validation)
    data, choice_set = Clothes(drawn.train, (images, labels), drawn.test), (choice_images, choice_labels)
    case.note(search_steps=searching, training_steps=training, part=part, choice=CHOICE, rate=RATE, rates=RATES)
    searches = {"Betty": lambda rate: by_betty(data, case.seed, searching, rate)}
    for name, response in RESPONSES.items():
        searches[name] = lambda rate, response=response: by_nestor(data, case.seed, searching, rate, response)
    for name, search in {"uniform mixture": None, **searches}.items():

        def trained(rate: float, name=name, search=search) -> Trained:
            chosen = strongest(search(rate)) if search else None
            network = retrained(case, name, chosen, data, training)
            return Trained(accuracy(network, choice_set), accuracy(network, data.test))

        tuned(case, name, RATES if search else (0.0,), trained)
    return {name: method.metrics["accuracy"] for name, method in case.methods.items()}


EXPERIMENT = Experiment("DARTS, by nestor and by Betty", run, bars("test accuracy (%)", 100), metric="accuracy",
                        ours="nestor, T1T2(scale=0.1, reuse=True)", baselines=("Betty",))  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
