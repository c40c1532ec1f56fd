"""Meta-Weight-Net: a small network learns the weight of a training image from its loss.

40 % of the training labels are wrong. The lower level trains a classifier on weighted losses; the upper level learns
the weight function V, a perceptron 1-100-1 that reads a loss, from the loss on 1,000 clean guide images:

    min_v  L_guide(theta*(v))   with   theta*(v) = argmin_theta  sum_i V(l_i; v) l_i(theta) / sum_i V(l_i; v)

V reads the loss as a number (detached). As in the paper, one step of V follows each step of the classifier, and the
response is T1T2, the derivative through the last step.

Compared with the same training without weights, on the training images alone and with the guide images among them; the
latter also early-stopped on 1,000 validation images, and with the guide images alone. Meta-Weight-Net, too, has the
guide images among its training images. All have the same network, batches, number of lower steps and schedule. The
rate of each method is the best of 0.005, 0.01, 0.02, 0.03 and 0.05 by the accuracy on the validation images with seed
0; that of the weight function, 1e-4, is the better of 1e-3 and 1e-4. `auc`: how well the learned weights tell right
from wrong labels.

With the larger rate the weight function does not work: it moves before the losses of right and wrong labels differ, and
its sigmoid saturates at 1.

Data: Fashion-MNIST, 8,000 images for training, 1,000 guide, 1,000 validation, 10,000 test images.

Shu, Xie, Yi, Zhao, Zhou, Xu and Meng, Meta-Weight-Net: learning an explicit mapping for sample weighting, NeurIPS 2019,
section 4.2 (uniform noise, there on CIFAR).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import Adam

import nestor
from shared import noisy_clothes
from shared.batches import Batches
from shared.experiment import Case, Experiment, main
from shared.noisy_clothes import NoisyClothes, accuracy, level, outputs, plain_loss, small_cnn
from shared.weight_functions import WeightFunction

NOISE, TRAIN, GUIDE, VALIDATION, STEPS, EVERY = 0.4, 8_000, 1_000, 1_000, 2_000, 100
WEIGHT_RATE = 1e-4
RATES = {"plain": 0.02, "plain with guide": 0.02, "guide alone": 0.02, "Meta-Weight-Net": 0.03}


def weighted_loss(batch, classifier, weight):  # lower level: the weight function constrains the classifier
    images, labels = batch
    losses = F.cross_entropy(classifier(images), labels, reduction="none")
    weights = weight(losses.detach())
    return (weights * losses).sum() / weights.sum()


def meta_weight_net(classifier: nn.Module, weight: nn.Module, data: NoisyClothes, steps: int) -> nestor.Program:
    return nestor.Program(
        classifier=level(classifier, weighted_loss, data.all_labelled(), steps, rate=RATES["Meta-Weight-Net"]),
        weight=nestor.Problem(weight, plain_loss, data=Batches(*data.guide, size=noisy_clothes.BATCH),
                              optimizer=Adam(weight.parameters(), lr=WEIGHT_RATE)),  # reads the best response
    )  # fmt: skip


@dataclass
class Picture:
    losses: Tensor  # of the training images, by the classifier at the end
    weights: Tensor
    wrong: Tensor
    weight: nn.Module
    curves: dict[str, list[tuple[int, float]]]  # validation accuracy


class Curve(nestor.callbacks.Callback):
    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation(self, engine, metrics) -> None:
        self.points.append((engine.step, metrics["accuracy"]))


def run(case: Case) -> Picture:
    train, guide, steps = (400, 100, 20) if case.quick else (TRAIN, GUIDE, STEPS)
    data = noisy_clothes.load(case.data, case.seed, NOISE, train, guide, VALIDATION)
    case.note(steps=steps, train=train, guide=guide, noise=NOISE, weight_rate=WEIGHT_RATE, rates=RATES)
    curves = {}

    def validate(classifier):
        return {"accuracy": accuracy(classifier, data.validation)}

    def train_network(name: str, program: nestor.Program) -> nestor.callbacks.BestWeights:
        curve, best = Curve(), nestor.callbacks.BestWeights("accuracy", mode="max")
        every = max(steps * EVERY // STEPS, 1)
        case.train(name, program, steps, callbacks=[curve, best], validate=validate, validate_every=every)
        curves[name] = curve.points
        return best

    plain = {"plain": data.train, "plain with guide": data.all_labelled(), "guide alone": data.guide}
    for name, images in plain.items():
        with case.method(name) as method:
            network = small_cnn(case.seed)
            program = nestor.Program(classifier=level(network, plain_loss, images, steps, rate=RATES[name]))
            best = train_network(name, program)
            method.report(accuracy=accuracy(network, data.test))
        if name == "plain with guide":
            with case.method("plain with guide, early-stopped") as stopped:
                best.restore(program)
                stopped.report(accuracy=accuracy(network, data.test))
            stopped.seconds, stopped.peak_memory = method.seconds, method.peak_memory  # it is the same run
    with case.method("Meta-Weight-Net") as method:
        classifier, weight = small_cnn(case.seed), WeightFunction()
        train_network("Meta-Weight-Net", meta_weight_net(classifier, weight, data, steps))
        method.report(accuracy=accuracy(classifier, data.test))
    losses = F.cross_entropy(outputs(classifier, data.train[0]), data.train[1], reduction="none")
    weights = outputs(weight, losses)
    method.report(auc=roc_auc_score(~data.wrong, weights))
    return Picture(losses, weights, data.wrong, weight, curves)


def draw(figure: Figure, picture: Picture) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    top = float(picture.losses.quantile(0.99))
    bins = torch.linspace(0, top, 60).tolist()
    for name, chosen, color in (("right labels", ~picture.wrong, "C0"), ("wrong labels", picture.wrong, "C3")):
        left.hist(picture.losses[chosen].tolist(), bins, alpha=0.5, color=color, label=name)
    left.set(xlabel="loss of a training image at the end", ylabel="images")
    left.legend(loc="upper center")
    twin, points = left.twinx(), torch.linspace(0, top, 200)
    values = outputs(picture.weight, points)
    twin.plot(points, values / values.max(), "k", lw=2.5)
    twin.set(ylabel="learned weight (largest: 1)", ylim=(0, 1.05))
    twin.grid(visible=False)
    for name, curve in picture.curves.items():
        steps, values = zip(*curve, strict=True)
        right.plot(steps, [100 * value for value in values], label=name, lw=2.5 if name == "Meta-Weight-Net" else 1.2)
    right.set(xlabel="lower steps", ylabel="accuracy on validation images (%)")
    right.legend(loc="lower right")


EXPERIMENT = Experiment(
    title="Meta-Weight-Net: the weight of an image as a function of its loss",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="Meta-Weight-Net",
    baselines=("plain with guide", "plain with guide, early-stopped", "plain", "guide alone"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
