"""Three text sets whose documents keywords label: the parts of each, as mean word vectors."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from shared.data import text
from shared.keywords import FILMS, KEYWORDS, REUTERS, plain_words, weak_labels

GUIDES, VALIDATION, LENGTH = 100, 500, 256
SETTINGS = {
    "20 Newsgroups": (text.newsgroups, KEYWORDS),
    "Reuters R8": (text.reuters_r8, REUTERS),
    "Rotten Tomatoes": (text.rotten_tomatoes, FILMS),
}
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Documents:
    """The parts of a data set: features and true labels.

    Attributes:
        train: The documents to train on, those with a keyword only; no method reads their true labels.
        weak: Their weak labels.
        covered: The share of the documents to train on that have a keyword.
        guide: Documents whose true labels a method may learn from.
        validation: Documents that choose rates and parameters.
        test: The test split.
        groups: The number of classes.
    """

    train: Labelled
    weak: Tensor
    covered: float
    guide: Labelled
    validation: Labelled
    test: Labelled
    groups: int


@lru_cache(maxsize=len(SETTINGS))
def features(folder: Path, setting: str) -> tuple[text.Texts, Tensor]:
    """Read a data set; its features are those of the training split and then those of the test split."""
    documents = SETTINGS[setting][0](folder)
    return documents, text.word_features(folder, documents.train + documents.test, length=LENGTH)


@lru_cache(maxsize=1)
def load(folder: Path, setting: str, seed: int) -> Documents:
    """Draw the parts of the training split, and the ties of the votes."""
    documents, inputs = features(folder, setting)
    torch.manual_seed(seed)
    order = torch.randperm(len(documents.train))
    known, test = inputs.split([len(documents.train), len(documents.test)])
    mean, spread = known.mean(0), known.std(0)
    guide, validation, train = order.split([GUIDES, VALIDATION, len(order) - GUIDES - VALIDATION])
    words = [plain_words(documents.train[i]) for i in train]
    weak, covered = weak_labels(words, documents.names, SETTINGS[setting][1])
    share, train, weak = float(covered.float().mean()), train[covered], weak[covered]
    parts = [((known[i] - mean) / spread, documents.train_labels[i]) for i in (train, guide, validation)]
    target = ((test - mean) / spread, documents.test_labels)
    return Documents(parts[0], weak, share, parts[1], parts[2], target, len(documents.names))
