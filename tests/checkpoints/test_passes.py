"""Data that shuffle by the number of the pass: a resumed run sees the rows of an uninterrupted one, pass after pass."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import nestor

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata, in its loader

ROWS, BATCH = 20, 5


class Rotated(Sampler[int]):
    """The rows, rotated by the number of the pass."""

    def __init__(self) -> None:
        self.number = 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(row + 3 * self.number) % ROWS for row in range(ROWS)])

    def __len__(self) -> int:
        return ROWS


class Counted(IterableDataset[Tensor]):
    """A stream whose rows contain the number of the pass."""

    number = 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(ROWS) + 100 * self.number)


def hugging_face() -> Any:
    table = datasets.Dataset.from_dict({"row": list(range(ROWS))})
    return table.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=1).with_format("torch")


KINDS: dict[str, Callable[[], Any]] = {
    "a stream of Hugging Face": lambda: StatefulDataLoader(hugging_face(), batch_size=BATCH),
    "the stream alone": lambda: hugging_face().batch(BATCH),
    "a plain loader": lambda: DataLoader(hugging_face(), batch_size=BATCH),
    "a sampler": lambda: DataLoader(TensorDataset(torch.arange(ROWS)), batch_size=BATCH, sampler=Rotated()),
    "a stream of torch": lambda: DataLoader(Counted(), batch_size=BATCH),
    "inside another iterable": lambda: Wrapped(DataLoader(Counted(), batch_size=BATCH)),
}


class Wrapped:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def engine(kind: str, folder: Path, seen: list[list[int]]) -> nestor.Engine:
    net = nestor.Variable(torch.ones(2))

    def loss(batch: Any, net: nestor.Variable) -> Tensor:
        rows = batch["row"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch
        seen.append([int(row) for row in rows])
        return net().square().sum()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    program = nestor.Program(net=nestor.Problem(net, loss, data=KINDS[kind](), optimizer=optimizer))
    return nestor.Engine(program, callbacks=[nestor.callbacks.Checkpoint(folder, every=7)], seed=0, check=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Level 'net'. its data has no state_dict")
def test_passes_after_a_resume(kind: str, tmp_path: Path) -> None:
    """In the middle of the second pass; four more follow."""
    whole: list[list[int]] = []
    before: list[list[int]] = []
    after: list[list[int]] = []
    engine(kind, tmp_path / "whole", whole).run(24)
    engine(kind, tmp_path / "killed", before).run(7)
    engine(kind, tmp_path / "killed", after).run(24, resume="latest")
    assert before + after == whole
    passes = [sorted(row for batch in whole[begin : begin + 4] for row in batch) for begin in range(0, 24, 4)]
    assert all({row % 100 for row in rows} == set(range(ROWS)) for rows in passes)


@pytest.mark.parametrize("kind", ["a stream of Hugging Face", "a sampler", "inside another iterable"])
def test_each_pass_has_its_own_order(kind: str, tmp_path: Path) -> None:
    """Of six passes, at least three differ from the first."""
    seen: list[list[int]] = []
    engine(kind, tmp_path, seen).run(24)
    passes = [seen[begin : begin + 4] for begin in range(0, 24, 4)]
    assert sum(rows != passes[0] for rows in passes) >= 3
