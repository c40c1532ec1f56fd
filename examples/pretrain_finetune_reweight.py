"""Pretrain, finetune, reweight: three levels that learn which source images are worth pretraining on.

The lowest level pretrains a network on weighted source images, the middle level finetunes another one on a few target
images and stays near the first, and the upper level learns one weight for each source image from validation images:

    min_w  L_validation(phi*(w))   with   phi*(w)   = argmin_phi    L_target(phi) + strength |phi - theta*(w)|^2
                                          theta*(w) = argmin_theta  mean_i sigmoid(w_i) l_i(theta)

The source is MNIST, where 45 % of the labels are the next digit. The target is the digits of scikit-learn, from other
writers and another scanner, of which 30 are for training and 100 for validation. The weights are learned in one run of
the three levels. Then the two lower levels are trained anew with these weights, on all 130 target images. Compared
with training on the target alone, pretraining without weights, and one network on source and target: the same network,
the same number of lower steps in all, all 130 target images. The rates were not searched.
The weights do not tell wrong labels from right ones (`auc`, 0.5 is chance): `T1T2` puts the identity in place of the
inverse Hessian of the middle level, whose curvature the few target images decide. In a trial on another draw, with
`Implicit(damping=0.1)` there and a strength of 1, they did; one network on both domains was still better.

Data: MNIST, 1,000 images; scikit-learn's digits (UCI) at 28 x 28, 1,667 for test.
Zhang, Du, Xie and Xing, Learning by ignoring, with application to domain adaptation, 2020; an example of Betty, too.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import nestor
from shared.batches import Batches
from shared.digit_domains import Domains, domains, network
from shared.experiment import Case, Experiment, main

SOURCE, TARGET, VALIDATION, NOISE, STEPS = 1_000, 30, 100, 0.45, 1_000
RATE, JOINT_RATE, TARGET_RATE, WEIGHT_RATE, STRENGTH = 0.05, 0.05, 0.05, 0.1, 0.03


def pretrain_loss(batch, pretrained, weights):  # lowest level: source images with weights
    images, labels, index = batch
    losses = F.cross_entropy(pretrained(images), labels, reduction="none")
    return (torch.sigmoid(weights()[index]) * losses).mean()


def finetune_loss(batch, finetuned, pretrained):  # middle level: target images, near the pretrained network
    images, labels = batch
    pairs = zip(finetuned.parameters(), pretrained.parameters(), strict=True)
    return F.cross_entropy(finetuned(images), labels) + STRENGTH * sum((f - p).square().sum() for f, p in pairs)


def validation_loss(batch, finetuned):  # upper level
    images, labels = batch
    return F.cross_entropy(finetuned(images), labels)


def level(net: nn.Module, loss, data, rate: float, steps: int) -> nestor.Problem:
    optimizer = SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = CosineAnnealingLR(optimizer, steps)
    return nestor.Problem(net, loss, data=data, optimizer=optimizer, scheduler=schedule)


def learned_logits(case: Case, data: Domains, steps: int) -> Tensor:
    logits, net = nestor.Variable(torch.zeros(SOURCE)), network()
    optimizer = Adam(logits.parameters(), lr=WEIGHT_RATE)
    program = nestor.Program(
        pretrained=level(net, pretrain_loss, data.source, RATE, steps),
        finetuned=level(deepcopy(net), finetune_loss, data.target, RATE, steps),
        weights=nestor.Problem(logits, validation_loss, data=data.validation, optimizer=optimizer),
    )
    case.train("three levels", program, steps)
    return logits().detach()


def finetuned(case: Case, data: Domains, logits: Tensor, steps: int) -> nn.Module:
    """Pretrain and finetune with given weights: the two lower levels alone."""

    def fixed_loss(batch, pretrained):
        return pretrain_loss(batch, pretrained, lambda: logits)

    net = network()
    program = nestor.Program(
        pretrained=level(net, fixed_loss, data.source, RATE, steps),
        finetuned=level(deepcopy(net), finetune_loss, data.given, RATE, steps),
    )
    case.train("two levels", program, steps)
    return program.levels["finetuned"].problem.module


def trained(case: Case, parts: tuple[Batches, ...], rate: float, steps: int) -> nn.Module:
    def loss(batch, net):
        return sum(F.cross_entropy(net(images), labels) for images, labels, *_ in batch)

    program = nestor.Program(net=level(network(), loss, parts, rate, steps))
    case.train("one level", program, steps)
    return program.levels["net"].problem.module


def run(case: Case):
    steps = 20 if case.quick else STEPS
    case.note(steps=steps, source=SOURCE, target=TARGET, validation=VALIDATION, noise=NOISE, rate=RATE)
    case.note(joint_rate=JOINT_RATE, target_rate=TARGET_RATE, weight_rate=WEIGHT_RATE, strength=STRENGTH)
    data = domains(case.data, case.seed, SOURCE, TARGET, VALIDATION, NOISE)
    with case.method("learned weights") as method:
        logits = learned_logits(case, data, steps)
        net = finetuned(case, data, logits, steps)
    method.report(accuracy=data.accuracy(net), auc=roc_auc_score(~data.wrong, logits))
    baselines = {
        "pretraining without weights": lambda: finetuned(case, data, torch.full((SOURCE,), 20.0), 2 * steps),
        "source and target together": lambda: trained(case, (data.source, data.given), JOINT_RATE, 2 * steps),
        "target alone": lambda: trained(case, (data.given,), TARGET_RATE, 2 * steps),
    }
    for name, train in baselines.items():
        with case.method(name) as method:
            net = train()
        method.report(accuracy=data.accuracy(net))
    return data, torch.sigmoid(logits)


def draw(figure: Figure, picture) -> None:
    data, weights = picture
    (images, labels, _), wrong = data.source.tensors, data.wrong
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    left.suptitle("source images with the highest (above) and the lowest weights (below), and their labels")
    order, columns = weights.argsort(descending=True), 11
    ranked = torch.cat([order[: 2 * columns], order[-2 * columns :]])
    for axis, index in zip(left.subplots(4, columns).flat, ranked, strict=True):
        axis.imshow(images[index, 0], cmap="gray_r")
        color = "tab:red" if wrong[index] else "tab:green"
        axis.set_title(f"{labels[index]}", fontsize=9, color=color, pad=2)
        axis.set_axis_off()
    axis, parts = right.subplots(), [weights[~wrong], weights[wrong]]
    axis.hist(parts, bins=30, label=["right label", "wrong label"], color=["tab:green", "tab:red"], stacked=True)
    axis.set(xlabel="weight", ylabel="source images")
    axis.legend()


EXPERIMENT = Experiment(
    title="Pretrain, finetune, reweight: three levels",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="learned weights",
    baselines=("pretraining without weights", "source and target together", "target alone"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
