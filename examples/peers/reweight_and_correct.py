"""Weak labels of text, reweighted and corrected, by nestor and by Betty: two upper levels that are peers.

The task is that of `examples/reweight_and_correct.py`, with 3,000 posts and 500 steps: keywords label posts of 20
newsgroups, about 40 % of these weak labels are wrong, and 200 posts with true labels are the guide of both upper
levels, a network that weights a post and one that corrects its label. Each steps after every step of the classifier,
which has no dropout here: Betty's finite differences draw a new mask for each of their two losses.

Each library searches the rates of the two upper levels among the same three pairs, for every seed, by the accuracy on
500 further posts (`rate` is that of the correction; that of the weights is a third of it). `accuracy` is that on the
7,528 test posts, after the last step. "Weak labels" is the classifier alone.

nestor uses its default response, the exact `T1T2`, and as a second method `FiniteDifference(reuse=True)`. Betty uses
the method of its own example of this task, finite differences ("darts"). The weights read the losses detached; a
difference moves them all the same, so it is not the derivative of the loss as written, and nestor warns of it.
Seconds are those of all three trainings.
"""

import torch
import torch.nn.functional as F
from betty.configs import Config
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from shared.bars import bars
from shared.batches import Batches
from shared.betty_levels import BettyLevel, run_betty
from shared.data import text
from shared.experiment import Case, Experiment, main
from shared.keywords import weak_labels
from shared.label_networks import Correction, Weights
from shared.search import Trained, tuned

STEPS, TRAIN, GUIDES, VALIDATION, BATCH, LENGTH = 500, 3_000, 200, 500, 100, 256
GROUPS, RATE, RATES = 20, 0.05, (3e-4, 1e-3, 3e-3)
RESPONSES = {
    "nestor, T1T2": nestor.T1T2(),
    "nestor, FiniteDifference(reuse=True)": nestor.FiniteDifference(reuse=True),
}


def weighted_loss(batch, classifier, weights, correction) -> Tensor:  # lower level
    features, weak = batch
    losses = F.cross_entropy(classifier(features), correction(features, weak), reduction="none")
    return (weights(losses.detach(), weak) * losses).mean()


def plain_loss(batch, classifier) -> Tensor:  # both upper levels
    features, labels = batch
    return F.cross_entropy(classifier(features), labels)


def new_classifier(width: int) -> tuple[nn.Module, SGD]:
    net = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, GROUPS))
    return net, SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)


def uppers(width: int, rate: float) -> dict[str, tuple[nn.Module, Adam]]:
    weights, correction = Weights(GROUPS), Correction(width, GROUPS)
    return {
        "weights": (weights, Adam(weights.parameters(), lr=rate / 3)),
        "correction": (correction, Adam(correction.parameters(), lr=rate)),
    }


def nestor_program(noisy: Batches, guide: Batches, seed: int, rate: float, response: nestor.Response) -> nestor.Program:
    torch.manual_seed(seed)
    net, optimizer = new_classifier(noisy.tensors[0].shape[1])
    lower = nestor.Problem(net, weighted_loss, data=noisy, optimizer=optimizer, response=response)
    levels = {
        name: nestor.Problem(module, plain_loss, data=guide, optimizer=steps)
        for name, (module, steps) in uppers(noisy.tensors[0].shape[1], rate).items()
    }
    return nestor.Program(classifier=lower, **levels)


def betty_levels(noisy: Batches, guide: Batches, seed: int, rate: float) -> list[BettyLevel]:
    torch.manual_seed(seed)
    net, optimizer = new_classifier(noisy.tensors[0].shape[1])
    lower = BettyLevel("classifier", net, weighted_loss, data=noisy, optimizer=optimizer, config=Config("darts"))
    levels = uppers(noisy.tensors[0].shape[1], rate)
    return [lower, *(BettyLevel(name, m, plain_loss, data=guide, optimizer=o) for name, (m, o) in levels.items())]


def run(case: Case) -> dict[str, float]:
    posts = text.newsgroups(case.data)
    train, steps, unseen = (800, 40, 400) if case.quick else (TRAIN, STEPS, len(posts.test))
    generator = torch.Generator().manual_seed(case.seed)
    index = torch.randperm(len(posts.train), generator=generator)[: train + GUIDES + VALIDATION]
    texts, truth = [posts.train[i] for i in index], posts.train_labels[index]
    features = text.word_features(case.data, texts + posts.test[:unseen], length=LENGTH)
    features = (features - features[:train].mean(0)) / features[:train].std(0)
    weak, covered = weak_labels(texts[:train], posts.names)
    x, guide_x, validation_x, test_x = features.split([train, GUIDES, VALIDATION, unseen])
    _, guide_y, validation_y = truth.split([train, GUIDES, VALIDATION])
    noisy, guide = Batches(x[covered], weak[covered], size=BATCH), Batches(guide_x, guide_y, size=BATCH)
    case.note(steps=steps, train=train, guides=GUIDES, rate=RATE, rates=RATES, covered=int(covered.sum()))

    def by_nestor(rate: float, response: nestor.Response) -> nn.Module:
        program = nestor_program(noisy, guide, case.seed, rate, response)
        nestor.Engine(program, seed=case.seed).run(steps)
        return program.levels["classifier"].problem.module

    def by_betty(rate: float) -> nn.Module:
        levels = betty_levels(noisy, guide, case.seed, rate)
        run_betty(levels, steps, case.seed)
        return levels[0].module

    def weak_alone(_: float) -> nn.Module:
        torch.manual_seed(case.seed)
        net, optimizer = new_classifier(x.shape[1])
        level = nestor.Problem(net, plain_loss, data=noisy, optimizer=optimizer)
        nestor.Engine(nestor.Program(classifier=level), seed=case.seed).run(steps)
        return net

    makers = {"weak labels": weak_alone, "Betty": by_betty}
    for name, response in RESPONSES.items():
        makers[name] = lambda rate, response=response: by_nestor(rate, response)
    for name, make in makers.items():

        def trained(rate: float, make=make) -> Trained:
            net = make(rate)
            return Trained(accuracy(net, validation_x, validation_y), accuracy(net, test_x, posts.test_labels[:unseen]))

        tuned(case, name, (0.0,) if name == "weak labels" else RATES, trained)
    return {name: method.metrics["accuracy"] for name, method in case.methods.items()}


@torch.no_grad()
def accuracy(net: nn.Module, features: Tensor, labels: Tensor) -> float:
    return float((net(features).argmax(1) == labels).float().mean())


EXPERIMENT = Experiment("Weak labels of text, by nestor and by Betty", run, bars("test accuracy (%)", 100),
                        metric="accuracy", ours="nestor, T1T2", baselines=("Betty",))  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
