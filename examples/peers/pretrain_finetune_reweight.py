"""Pretrain, finetune, reweight by nestor and by Betty: three levels that read each other in a chain.

The task is that of `examples/pretrain_finetune_reweight.py`, smaller and with a stronger pull between the networks
(0.3): 600 steps. The lowest level pretrains a network on 500 images of MNIST with weights, of which 45 % have the
next digit as label. The middle level finetunes another network on 30 images of scikit-learn's digits and stays near
the first one. The upper level learns one weight for each image of MNIST from 100 other images of the target. Every
level steps once in each engine step.

Each library searches the rate of the weights among the same three, for every seed, by the accuracy of the finetuned
network on 300 further images of the target. `accuracy` is that of the finetuned network, as the run of three levels
leaves it, on the 1,367 remaining images; `auc` tells how well the weights separate right from wrong labels. "Equal
weights" is the same run in which the weights stay equal.

nestor uses its default response, the exact `T1T2`, at both levels that are read, and as a second method
`FiniteDifference(reuse=True)`. Betty uses the method of its own example of this task, finite differences ("darts").
The hypergradients agree up to the error of a difference (`tests/gallery/test_peer_hypergradients.py`). Seconds are
those of all three trainings.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from betty.configs import Config
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.bars import bars
from shared.betty_levels import BettyLevel, run_betty
from shared.digit_domains import Domains, domains, network
from shared.experiment import Case, Experiment, main
from shared.search import Trained, tuned

SOURCE, TARGET, VALIDATION, CHOICE, NOISE, STEPS = 500, 30, 100, 300, 0.45, 600
RATE, STRENGTH, RATES = 0.05, 0.3, (0.1, 0.3, 1.0)
RESPONSES = {
    "nestor, T1T2": nestor.T1T2(),
    "nestor, FiniteDifference(reuse=True)": nestor.FiniteDifference(reuse=True),
}


def pretrain_loss(batch, pretrained, weights) -> Tensor:  # lowest level: source images with weights
    images, labels, index = batch
    losses = F.cross_entropy(pretrained(images), labels, reduction="none")
    return (torch.sigmoid(weights()[index]) * losses).mean()


def finetune_loss(batch, finetuned, pretrained) -> Tensor:  # middle level: target images, near the pretrained network
    images, labels = batch
    pairs = zip(finetuned.parameters(), pretrained.parameters(), strict=True)
    return F.cross_entropy(finetuned(images), labels) + STRENGTH * sum((f - p).square().sum() for f, p in pairs)


def validation_loss(batch, finetuned) -> Tensor:  # upper level
    images, labels = batch
    return F.cross_entropy(finetuned(images), labels)


def start(seed: int) -> tuple[nn.Module, nn.Module, nestor.Variable]:
    torch.manual_seed(seed)
    net = network()
    return net, deepcopy(net), nestor.Variable(torch.zeros(SOURCE))


def scheduled(net: nn.Module, steps: int) -> dict:
    optimizer = SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    return {"optimizer": optimizer, "scheduler": CosineAnnealingLR(optimizer, steps)}


def nestor_program(data: Domains, seed: int, steps: int, rate: float, response: nestor.Response) -> nestor.Program:
    pretrained, finetuned, logits = start(seed)
    read = {"response": response}
    return nestor.Program(
        pretrained=nestor.Problem(pretrained, pretrain_loss, data=data.source, **scheduled(pretrained, steps), **read),
        finetuned=nestor.Problem(finetuned, finetune_loss, data=data.target, **scheduled(finetuned, steps), **read),
        weights=nestor.Problem(logits, validation_loss, data=data.validation,
                               optimizer=Adam(logits.parameters(), lr=rate)),
    )  # fmt: skip


def betty_levels(data: Domains, seed: int, steps: int, rate: float) -> list[BettyLevel]:
    pretrained, finetuned, logits = start(seed)
    optimizer, config = Adam(logits.parameters(), lr=rate), Config("darts")
    return [
        BettyLevel(
            "pretrained", pretrained, pretrain_loss, data=data.source, config=config, **scheduled(pretrained, steps)
        ),
        BettyLevel(
            "finetuned", finetuned, finetune_loss, data=data.target, config=config, **scheduled(finetuned, steps)
        ),
        BettyLevel("weights", logits, validation_loss, data=data.validation, optimizer=optimizer),
    ]


def by_nestor(data: Domains, seed: int, steps: int, rate: float, response: nestor.Response) -> tuple[nn.Module, Tensor]:
    program = nestor_program(data, seed, steps, rate, response)
    nestor.Engine(program, seed=seed).run(steps)
    _, finetuned, logits = (level.problem.module for level in program.levels.values())
    return finetuned, logits().detach()


def by_betty(data: Domains, seed: int, steps: int, rate: float) -> tuple[nn.Module, Tensor]:
    levels = betty_levels(data, seed, steps, rate)
    run_betty(levels, steps, seed)
    return levels[1].module, levels[2].module().detach()


def run(case: Case) -> dict[str, float]:
    steps = 20 if case.quick else STEPS
    data = domains(case.data, case.seed, SOURCE, TARGET, VALIDATION, NOISE)
    images, labels = data.test
    case.note(steps=steps, source=SOURCE, target=TARGET, validation=VALIDATION, choice=CHOICE, noise=NOISE)
    case.note(rate=RATE, rates=RATES, strength=STRENGTH)
    makers = {"Betty": lambda rate: by_betty(data, case.seed, steps, rate)}
    for name, response in RESPONSES.items():
        makers[name] = lambda rate, response=response: by_nestor(data, case.seed, steps, rate, response)
    for name, make in {"equal weights": makers["nestor, T1T2"], **makers}.items():
        found: dict[float, float] = {}

        def trained(rate: float, make=make, found=found) -> Trained:
            net, logits = make(rate)
            found[rate] = roc_auc_score(~data.wrong, logits)
            with torch.no_grad():
                right = (net(images).argmax(1) == labels).float()
            return Trained(float(right[:CHOICE].mean()), float(right[CHOICE:].mean()))

        tuned(case, name, (0.0,) if name == "equal weights" else RATES, trained)
        case.methods[name].report(auc=found[case.methods[name].metrics["rate"]])
    return {name: method.metrics["accuracy"] for name, method in case.methods.items()}


EXPERIMENT = Experiment("Pretrain, finetune, reweight, by nestor and by Betty", run, bars("test accuracy (%)", 100),
                        metric="accuracy", ours="nestor, T1T2", baselines=("Betty",))  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
