"""Rows of Adult with the products of their features, in groups: a group for each feature and for each pair."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data.tabular import adult

NUMBERS = ("age", "education_num", "gain", "loss", "hours")
CATEGORIES = ("workclass", "education", "marital", "occupation", "relationship", "race", "sex", "country")
FEATURES = NUMBERS + CATEGORIES
RARE = 5
"""A product that is not zero in fewer of the rows is left out."""


@dataclass(frozen=True)
class Census:
    """Inputs with a column of ones first, labels, and the group of each further column.

    Attributes:
        groups: Pairs of positions in ``FEATURES``; a feature itself is a pair of equal ones.
        group: The position in ``groups`` of each column but the first.
        single: Which columns are no products.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    groups: list[tuple[int, int]]
    group: Tensor
    single: Tensor

    def by_group(self, values: Tensor) -> dict[str, float]:
        """Return the value of each group, by its name, of values that the columns of a group share."""
        found = dict(zip(self.group.tolist(), values.tolist(), strict=True))
        names = [FEATURES[i] if i == j else f"{FEATURES[i]} x {FEATURES[j]}" for i, j in self.groups]
        return {name: found[number] for number, name in enumerate(names)}

    def table(self, values: Tensor) -> Tensor:
        """Return the same as a symmetric table of features; NaN where a pair has no product."""
        table = torch.full((len(FEATURES), len(FEATURES)), torch.nan)
        for (i, j), value in zip(self.groups, self.by_group(values).values(), strict=True):
            table[i, j] = table[j, i] = value
        return table


def census(folder: Path, seed: int, rows: int) -> Census:
    """Draw training rows from the training part of Adult; the test part is whole."""
    table = adult(folder, standardize=False)
    drawn = torch.randperm(len(table.train), generator=torch.Generator().manual_seed(seed))[:rows]
    number = torch.tensor([name in NUMBERS for name in table.columns])
    heavy = torch.tensor([name in ("gain", "loss") for name in table.columns])
    train, test = (torch.where(heavy, part.log1p(), part) for part in (table.train[drawn], table.test))
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-3)
    train, test = (torch.where(number, (part - mean) / deviation, part) for part in (train, test))
    feature = [_feature(name) for name in table.columns]
    first, second = _products(train, feature)
    pairs = [(index, index) for index in feature]
    pairs += [tuple(sorted((feature[i], feature[j]))) for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    groups = sorted(set(pairs))
    return Census(
        _expanded(train, first, second), table.train_labels[drawn].float(),
        _expanded(test, first, second), table.test_labels.float(),
        groups, torch.tensor([groups.index(pair) for pair in pairs]), torch.arange(len(pairs)) < len(feature),
    )  # fmt: skip


def _feature(column: str) -> int:
    return FEATURES.index(column if column in NUMBERS else column.rsplit("_", 1)[0])


def _products(values: Tensor, feature: list[int]) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(values.shape[1], values.shape[1], offset=1)
    across = torch.tensor(feature)[first] != torch.tensor(feature)[second]
    first, second = first[across], second[across]
    common = ((values != 0).float().T @ (values != 0).float())[first, second] >= RARE
    return first[common], second[common]


def _expanded(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.pad(torch.cat([values, values[:, first] * values[:, second]], 1), (1, 0), value=1.0)
