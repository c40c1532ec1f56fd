"""Several loaders at one level: data=(a, b)."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import nestor
from nestor.distributed import SingleDevice


class Numbers(Dataset[Tensor]):
    """A number each, with augmentation."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.first + index + 0.1 * torch.rand(())


class Letters:
    """An iterable that is no list."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __iter__(self) -> Iterator[str]:
        return iter(self.text)


def engine_of(data: Any, **options: Any) -> tuple[nestor.Engine, list[Any]]:
    """Return an engine of one level, and the list of the batches that its loss gets."""
    seen: list[Any] = []
    variable = nestor.Variable(torch.zeros(()))

    def loss(batch: Any, level: Any) -> Tensor:
        seen.append(batch)
        return level().square()

    problem = nestor.Problem(variable, loss, data=data, optimizer=torch.optim.SGD(variable.parameters(), 0.1))
    return nestor.Engine(nestor.Program(level=problem), seed=3, **options), seen


def drawn(data: Any, steps: int) -> list[Any]:
    engine, seen = engine_of(data)
    engine.run(steps)
    return seen


def shuffled(seed: int) -> DataLoader[Tensor]:
    return DataLoader(Numbers(100 * seed, 7), batch_size=2, shuffle=True)


def test_each_loader_restarts_on_its_own() -> None:
    expected = [("a", "x"), ("b", "y"), ("c", "x"), ("a", "y"), ("b", "x"), ("c", "y"), ("a", "x")]
    assert drawn((["a", "b", "c"], ["x", "y"]), 7) == expected
    assert drawn((Letters("abc"), ["x", "y"]), 7) == expected
    assert drawn((Letters("ab"),), 3) == [("a",), ("b",), ("a",)]
    assert drawn(([(1, 2)], [(3, 4), (5, 6)], Letters("p")), 2) == [((1, 2), (3, 4), "p"), ((1, 2), (5, 6), "p")]


def test_a_tuple_of_batches_is_a_data_set() -> None:
    """As a list is: tensors, tuples, mappings, words."""
    one, two = torch.zeros(2), torch.ones(2)
    for data in (
        (one, two),
        ((one, two), (two, one)),
        ({"x": one}, {"x": two}),
        ("one", "two"),
        ([one], (two,)),
        (1, 2),
    ):
        assert all(found is given for found, given in zip(drawn(data, 3), (*data, data[0]), strict=True))


def test_what_is_ambiguous_is_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"a tuple of lists of tensors.*data=\[\[x, y\], \.\.\.\]"):
        engine_of(([x, x], [x, x]))
    for batch in (x, (x, x), {"x": x}, "word", x.numpy()):
        with pytest.raises(TypeError, match="entry 1 is a batch, and another entry is a loader"):
            engine_of((Letters("ab"), batch))
    y, z = torch.ones(2), torch.ones(3)
    found = drawn(([x, y], [z]), 2)  # lists of different lengths are no batches of one loss
    assert [tuple(map(id, batch)) for batch in found] == [(id(x), id(z)), (id(y), id(z))]
    with pytest.raises(nestor.NestorError, match="data is empty"):
        drawn((Letters("ab"), []), 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 9])
def test_resumed_bit_for_bit(steps: int) -> None:
    """Both loaders shuffle and augment; they restart after four and after three batches."""

    def loaders() -> Any:
        return shuffled(1), DataLoader(Numbers(0, 6), batch_size=2, shuffle=True)

    engine, seen = engine_of(loaders())
    engine.run(12)
    first, _ = engine_of(loaders())
    first.run(steps)
    second, rest = engine_of(loaders())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)  # batches are drawn again to restore the position
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run(12 - steps)
    for one, other in zip(rest, seen[steps:], strict=True):
        assert all(map(torch.equal, one, other))
    epochs = torch.cat([batch[0] for batch in seen[:4]]), torch.cat([batch[0] for batch in seen[4:8]])
    assert all(sorted(epoch.int().tolist()) == list(range(100, 107)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_the_first_loader_draws_as_if_it_were_alone() -> None:
    alone = drawn(shuffled(1), 6)
    assert all(
        torch.equal(one, other[0]) for one, other in zip(alone, drawn((shuffled(1), shuffled(2)), 6), strict=True)
    )


class Halves(SingleDevice):
    """The second of two processes: it loads the last rows of a loader, and cuts what other data yield."""

    rank, size = 1, 2

    def data(self, data: Any) -> Any:
        if not isinstance(data, DataLoader):
            return data
        return [batch[len(batch) // 2 :] for batch in data]

    def share(self, batch: Any) -> Any:
        return batch[len(batch) // 2 :]


def test_processes_share_the_batches_of_each_loader() -> None:
    """Of loaders with batches of different sizes, and of one that the runtime cannot load in part."""
    first, second = DataLoader(Numbers(0, 8), batch_size=4), [torch.arange(2.0), torch.arange(2.0, 4)]
    engine, seen = engine_of((first, second), runtime=Halves())
    engine.run(2)
    assert [batch[0].int().tolist() for batch in seen] == [[2, 3], [6, 7]]
    assert [batch[1].tolist() for batch in seen] == [[1.0], [3.0]]
