"""Bilevel pruning: learn which few weights of a network are kept.

The lower level trains the weights of a multilayer perceptron under a mask, and the upper level learns the mask. Its
variables are scores; the mask keeps the weights with the largest ones, and its gradient goes to the scores unchanged.

    min_s  L(theta*(s), m(s))   with   theta*(s) = argmin_theta  L(theta, m(s)) + decay / 2 |theta|^2

    L(theta, m): cross-entropy of the network with the weights m * theta;   m(s): 1 for the k largest scores, else 0

Both levels start from one dense network: the scores are the magnitudes of its weights. The response is T1T2: the paper
replaces the Hessian by a multiple of the identity, too.

Compared with iterative magnitude pruning (the kept share falls geometrically in 6 rounds during the first half of the
steps), with one-shot magnitude pruning and with random masks, all with fine-tuning: the same dense network, the same
600 lower steps, optimizer and schedule. An upper step follows each lower step, so the bilevel method costs about four
times as much. Rates, rounds and the scale of the response (12 settings of the bilevel method, 3 to 12 of the others)
were compared with seed 0 at 3 % on 2,000 validation images; with scale 1 it diverges.

The learned masks are better than one-shot ones, the more so the fewer weights are kept, and no better than those of
iterative pruning, which costs less.

Data: MNIST, 6,000 images for training and 2,000 for validation from its training part, 10,000 for test.
Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu, Advancing model pruning via bi-level optimization, NeurIPS 2022 (BiP).
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from network_pruning_report import draw
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.batches import Batches
from shared.data import images
from shared.experiment import Case, Experiment, main
from shared.masks import Masks, Perceptron, largest, magnitudes

SHARES, HEADLINE, STEPS, DENSE_STEPS, ROUNDS, BATCH = (0.05, 0.03, 0.02, 0.01), 0.03, 600, 400, 6, 100
METHODS = ("bilevel", "iterative magnitude", "one-shot magnitude", "random masks")
DENSE_RATE, RATE, SCORE_RATE, SCALE, DECAY = 0.1, 0.3, 0.1, 0.3, 1e-4


Pruned = tuple[Perceptron, list[Tensor]]


def mask_loss(batch, masks, network):  # upper level: reads the best response of the weights
    pixels, labels = batch
    return F.cross_entropy(network(pixels, masks()), labels)


def weight_loss(batch, network, masks):  # lower level: the masks constrain the weights
    squares = sum(layer.weight.square().sum() for layer in network.layers)
    return mask_loss(batch, masks, network) + DECAY / 2 * squares


def bilevel(case: Case, dense: Perceptron, share: float, data: Batches, steps: int) -> Pruned:
    network, masks = copy.deepcopy(dense), Masks(magnitudes(dense), share)
    optimizer = SGD(masks.parameters(), lr=SCORE_RATE, momentum=0.9)
    program = nestor.Program(
        network=weight_problem(network, weight_loss, data, steps, response=nestor.T1T2(scale=SCALE, reuse=True)),
        masks=nestor.Problem(
            masks, mask_loss, data=data, optimizer=optimizer, scheduler=CosineAnnealingLR(optimizer, steps)
        ),
    )
    case.train(f"bilevel, {share:.0%} kept", program, steps)
    return network, largest([score.detach() for score in masks.scores], share)


def weight_problem(network: Perceptron, loss, data: Batches, steps: int, rate=None, **options) -> nestor.Problem:
    optimizer = SGD(network.parameters(), lr=rate or RATE, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, steps)
    return nestor.Problem(network, loss, data=data, optimizer=optimizer, scheduler=scheduler, **options)


def one_shot(case: Case, dense: Perceptron, share: float, data: Batches, steps: int) -> Pruned:
    return fine_tuned(case, f"one-shot, {share:.0%} kept", dense, largest(magnitudes(dense), share), data, steps)


def at_random(case: Case, dense: Perceptron, share: float, data: Batches, steps: int) -> Pruned:
    masks = largest([torch.rand_like(layer.weight) for layer in dense.layers], share)
    return fine_tuned(case, f"random, {share:.0%} kept", dense, masks, data, steps)


def iterative(case: Case, dense: Perceptron, share: float, data: Batches, steps: int) -> Pruned:
    """The kept share falls geometrically in ROUNDS rounds during the first half of the steps; the rest fine-tunes."""
    network, masks = copy.deepcopy(dense), [torch.ones_like(layer.weight) for layer in dense.layers]
    loss = partial(weight_loss, masks=lambda: masks)
    engine = nestor.Engine(nestor.Program(network=weight_problem(network, loss, data, steps)), seed=case.seed)
    for number in range(1, ROUNDS + 1):
        kept = [mask * weight for mask, weight in zip(masks, magnitudes(network), strict=True)]
        masks[:] = largest(kept, share ** (number / ROUNDS))
        engine.run(steps // 2 // ROUNDS)
    engine.run(steps - steps // 2 // ROUNDS * ROUNDS)
    return network, masks


def fine_tuned(case: Case, name: str, dense: Perceptron, masks: list, data: Batches, steps: int, **rate) -> Pruned:
    network, loss = copy.deepcopy(dense), partial(weight_loss, masks=lambda: masks)
    case.train(name, nestor.Program(network=weight_problem(network, loss, data, steps, **rate)), steps)
    return network, masks


PRUNE = dict(zip(METHODS, (bilevel, iterative, one_shot, at_random), strict=True))


@dataclass
class Picture:
    dense: float
    accuracies: dict[str, list[float]]  # of every method, at every share
    shares: tuple[float, ...]
    read: dict[str, Tensor]  # how many weights of the first layer read a pixel, at the headline share


def accuracy(pruned: Pruned, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((pruned[0](pixels, pruned[1]).argmax(1) == labels).float().mean())


def run(case: Case) -> Picture:
    data = images.mnist(case.data)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(case.seed))
    train = order[: 600 if case.quick else 6_000]
    batches, test = Batches(data.train[train].flatten(1), data.train_labels[train], size=BATCH), data.test.flatten(1)
    steps, dense_steps = (12, 30) if case.quick else (STEPS, DENSE_STEPS)
    case.note(steps=[dense_steps, steps], batch=BATCH, scale=SCALE, rates=[DENSE_RATE, RATE, SCORE_RATE])
    with case.method("dense network") as method:
        everything = [torch.ones_like(layer.weight) for layer in Perceptron().layers]
        dense, _ = fine_tuned(case, "dense", Perceptron(), everything, batches, dense_steps, rate=DENSE_RATE)
        method.report(accuracy=accuracy((dense, everything), test, data.test_labels))
    picture = Picture(method.metrics["accuracy"], {}, SHARES, {})
    for name, prune in PRUNE.items():
        with case.method(name) as method:
            pruned = {share: prune(case, dense, share, batches, steps) for share in SHARES}
            curve = [accuracy(each, test, data.test_labels) for each in pruned.values()]
            others = {f"at {share:.0%}": value for share, value in zip(SHARES, curve, strict=True) if share != HEADLINE}
            method.report(accuracy=curve[SHARES.index(HEADLINE)], **others)
        picture.accuracies[name], picture.read[name] = curve, pruned[HEADLINE][1][0].sum(0).view(28, 28)
    return picture


EXPERIMENT = Experiment("Bilevel network pruning", run, draw, metric="accuracy", ours=METHODS[0], baselines=METHODS[1:])

if __name__ == "__main__":
    main(EXPERIMENT)
