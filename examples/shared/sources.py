"""Sources of text for a language model of posts about ice hockey."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.data import text


@dataclass(frozen=True)
class Sources:
    """Texts to train on by source, of which the first is the target, and further texts of the target."""

    train: dict[str, list[str]]
    guide: list[str]
    validation: list[str]
    test: list[str]


def hockey_sources(folder: Path, seed: int, *, posts: int, validation: int, texts: int) -> Sources:
    """Few posts about hockey, other newsgroups, Reuters news, film reviews, and reviews with shuffled words.

    Args:
        folder: The data folder.
        seed: Which texts are drawn.
        posts: Hockey posts for training; as many others are the guide.
        validation: Hockey posts for validation.
        texts: Texts of every other source, three times as many reviews, which are short; hockey posts for test.
    """
    groups, news, reviews = text.newsgroups(folder), text.reuters_r8(folder), text.rotten_tomatoes(folder)
    generator = torch.Generator().manual_seed(seed)

    def draw(source: Sequence[str], count: int = texts) -> list[str]:
        return [source[index] for index in torch.randperm(len(source), generator=generator)[:count]]

    def chosen(source: list[str], labels: torch.Tensor, *names: str) -> list[str]:
        numbers = {number for number, name in enumerate(groups.names) if name.startswith(names)}
        return [post for post, label in zip(source, labels.tolist(), strict=True) if label in numbers]

    def group(*names: str) -> list[str]:
        return draw(chosen(groups.train, groups.train_labels, *names))

    hockey = draw(chosen(groups.train, groups.train_labels, "rec.sport.hockey"), 2 * posts + validation)
    films = [" ".join(re.findall("[a-z]+", review.lower())) for review in draw(reviews.train, 6 * texts)]
    train = {
        "hockey": hockey[:posts],
        "baseball": group("rec.sport.baseball"),
        "motors": group("rec.autos", "rec.motorcycles"),
        "computers": group("comp"),
        "science": group("sci"),
        "politics": group("talk.politics"),
        "religion": group("alt.atheism", "soc.religion", "talk.religion"),
        "news": draw(news.train),
        "reviews": films[: 3 * texts],
        "shuffled": [" ".join(draw(review.split(), 1_000)) for review in films[3 * texts :]],
    }
    test = draw(chosen(groups.test, groups.test_labels, "rec.sport.hockey"))
    return Sources(train, hockey[posts : 2 * posts], hockey[2 * posts :], test)


class RowsOfEach:
    """Endless batches with as many blocks of words of each source: sources x rows x words."""

    def __init__(self, sources: list[Tensor], rows: int) -> None:
        self.sources, self.rows = sources, rows // len(sources)

    def __iter__(self):
        while True:
            yield torch.stack([rows[torch.randint(len(rows), (self.rows,))] for rows in self.sources])


class Mixture:
    """Endless batches of blocks of words, whose sources are drawn with the given shares."""

    def __init__(self, sources: list[Tensor], shares: Sequence[float], rows: int) -> None:
        self.sources, self.shares, self.rows = sources, torch.tensor(shares), rows

    def __iter__(self):
        while True:
            chosen = [self.sources[index] for index in self.shares.multinomial(self.rows, replacement=True)]
            yield torch.stack([rows[int(torch.randint(len(rows), ()))] for rows in chosen])
