"""Data pruning with an EMA teacher: keep the 40 % of the images that are worth training on.

30 % of the training labels are wrong. The lower level trains a classifier on weighted losses; the upper level learns
the importance V of an image, a perceptron that reads its loss and its uncertainty, from the loss on 500 guide images:

    min_v  L_guide(theta*(v))   with   theta*(v) = argmin_theta  sum_i V(l_i, u_i; v) l_i(theta) / sum_i V(l_i, u_i; v)

    u_i = |p(x_i; theta) - p(x_i; theta_EMA)|_1: how far the classifier is from its exponential moving average

V reads numbers (detached). The teacher is a module of the loss's closure that a callback updates. The response is T1T2.
The importance of an image is the mean over the last quarter of the training. The 40 % that are kept are drawn in
proportion to it, and a new classifier is trained on them and the guide images. To keep the largest instead leaves the
easiest images only ("largest importance"): with seed 0 that is below random pruning, which is why images are drawn.

Compared with random pruning, with the images of largest EL2N (the error norm of a classifier early in training, which
finds hard images, and with them wrong labels) and, by a plain training, with those of smallest loss and with a draw
in proportion to the probability of the given label. Each has the guide images in its trainings. "All data", two and a
half times as many images, is no baseline: it is what pruning should not fall short of. All have the same network,
schedule and number of steps. `wrong` is the share of wrong labels among the kept images. The rate of the classifiers
was taken from `meta_weight_net.py`; that of the importance is 1e-3 and was not searched. "Drawn by loss" and "largest
importance" take the scores of the method above them: their seconds are those of the retraining.

Data: Fashion-MNIST, 8,000 images for training, 500 guide, 1,000 validation, 10,000 test images.

Choe, Mehta, Ahn, Neiswanger, Xie, Strubell and Xing, Making scalable meta learning practical, NeurIPS 2023, section 4.3
(SAMA; there without wrong labels). EL2N: Paul, Ganguli and Dziugaite, NeurIPS 2021.
"""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nestor
from shared import noisy_clothes
from shared.batches import Batches
from shared.experiment import Case, Experiment, main
from shared.noisy_clothes import NoisyClothes, accuracy, level, outputs, plain_loss, small_cnn
from shared.weight_functions import Importance, Watch, uncertainty_of

NOISE, TRAIN, GUIDE, STEPS, KEPT = 0.3, 8_000, 500, 800, 0.4
IMPORTANCE_RATE, WARMUP, DECAY = 1e-3, 100, 0.98


def pruning_program(classifier: nn.Module, teacher: nn.Module, importance: nn.Module, data: NoisyClothes, steps: int):
    def weighted_loss(batch, classifier, importance):  # lower level: the importance constrains the classifier
        images, labels = batch
        logits = classifier(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        uncertainty = uncertainty_of(logits.detach(), teacher(images))
        weights = importance(losses.detach(), uncertainty)
        return (weights * losses).sum() / weights.sum()

    return nestor.Program(
        classifier=level(classifier, weighted_loss, data.train, steps, warmup_steps=min(WARMUP, steps // 4)),
        importance=nestor.Problem(importance, plain_loss, data=Batches(*data.guide, size=noisy_clothes.BATCH),
                                  optimizer=Adam(importance.parameters(), lr=IMPORTANCE_RATE)),
    )  # fmt: skip


def learned_importance(case: Case, data: NoisyClothes, steps: int) -> Tensor:
    """Return loss, uncertainty and importance of each training image."""
    classifier, importance = small_cnn(case.seed), Importance()
    teacher = AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).requires_grad_(False)
    program = pruning_program(classifier, teacher, importance, data, steps)
    watch = Watch(classifier, teacher, importance, images=data.train[0], labels=data.train[1])
    case.train("learned importance", program, steps, callbacks=[watch])
    return torch.stack(watch.seen).mean(0)


def trained(case: Case, name: str, images, steps: int) -> nn.Module:
    network = small_cnn(case.seed)
    case.train(name, nestor.Program(classifier=level(network, plain_loss, images, steps)), steps)
    return network


def run(case: Case) -> tuple[NoisyClothes, Tensor, Tensor]:
    train, guide, steps = (400, 100, 20) if case.quick else (TRAIN, GUIDE, STEPS)
    data = noisy_clothes.load(case.data, case.seed, NOISE, train, guide, validation=1_000)
    case.note(steps=steps, train=train, guide=guide, noise=NOISE, kept=KEPT, **noisy_clothes.SETTINGS)
    case.note(importance_rate=IMPORTANCE_RATE, ema=DECAY)

    def plain_scores(early: float) -> Tensor:
        """Return the probabilities of a plain classifier minus the given labels."""
        network = trained(case, "plain scores", data.all_labelled(), int(early * steps))
        return outputs(network, data.train[0]).softmax(1) - F.one_hot(data.train[1], 10)

    def drawn(probability: Tensor) -> Tensor:
        """Scores whose largest are a random draw without replacement, in proportion to a probability (Gumbel)."""
        return probability.clamp(min=1e-9).log() - torch.rand_like(probability).log().neg().log()

    shares, found = torch.zeros(train), torch.zeros(3, train)
    scores = {
        "all data": lambda: torch.zeros(train),
        "random 40 %": lambda: torch.rand(train),
        "largest EL2N": lambda: plain_scores(0.25).norm(dim=1),
        "smallest loss": lambda: shares.copy_(1 + plain_scores(1.0).gather(1, data.train[1][:, None]).squeeze(1)),
        "drawn by loss": lambda: drawn(shares),
        "learned importance": lambda: drawn(found.copy_(learned_importance(case, data, steps))[2]),
        "largest importance": lambda: found[2],
    }
    chosen = {}
    for name, score in scores.items():
        with case.method(name) as method:
            kept = chosen[name] = score().topk(train if name == "all data" else int(KEPT * train)).indices
            images = [torch.cat([a[kept], b]) for a, b in zip(data.train, data.guide, strict=True)]
            network = trained(case, name, images, steps)
            method.report(accuracy=accuracy(network, data.test), validation=accuracy(network, data.validation))
            method.report(wrong=data.wrong[kept].float().mean())
    return data, found, torch.isin(torch.arange(train), chosen["learned importance"])


def draw(figure: Figure, picture: tuple[NoisyClothes, Tensor, Tensor]) -> None:
    data, (losses, uncertainty, importance), kept = picture
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    axes = left.subplots()
    points = axes.scatter(losses, uncertainty, c=importance, s=5, cmap="viridis")
    axes.set(xlabel="loss", ylabel="uncertainty against the EMA teacher", xlim=(0, float(losses.quantile(0.995))))
    left.colorbar(points, label="learned importance")
    order = importance.argsort(descending=True)
    rows = {
        "kept:\nmost important": order[:10],
        "dropped:\nleast important": order.flip(0)[:10],
        "dropped,\nlabel right": order[~kept[order] & ~data.wrong[order]].flip(0)[:10],
        "kept,\nlabel wrong": order[kept[order] & data.wrong[order]][:10],
    }
    for (title, chosen), line in zip(rows.items(), right.subplots(len(rows), 10), strict=True):
        noisy_clothes.draw_row(line, title, data, chosen)
    right.suptitle("images with the labels that are given (wrong ones red)", fontsize=10)


EXPERIMENT = Experiment(
    title="Data pruning with an EMA teacher",
    run=run,
    draw=draw,
    metric="accuracy",
    ours="learned importance",
    baselines=("random 40 %", "drawn by loss", "smallest loss", "largest EL2N"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
