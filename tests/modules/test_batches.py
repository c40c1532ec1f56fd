"""Batches of any type: moved to a device and cut into the shares of processes, they keep their type."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import nestor
from nestor.data.move import move

META = torch.device("meta")
ROWS = torch.arange(12.0).view(4, 3)


class Point(NamedTuple):
    """A named tuple."""

    x: Tensor
    name: str


@dataclass(frozen=True, slots=True)
class Frozen:
    """A dataclass whose second field is no argument."""

    x: Tensor
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", 2 * self.x)


class Encoding(UserDict[str, Tensor]):
    """A mapping with an attribute, which moves in place, like Hugging Face's BatchEncoding."""

    def __init__(self, data: dict[str, Tensor], length: int) -> None:
        super().__init__(data)
        self.length = length

    def to(self, device: torch.device) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Options(dict[str, Any]):
    """A dict with an attribute and other arguments."""

    def __init__(self, name: str, **values: Any) -> None:
        super().__init__(**values)
        self.name = name


class Graph:
    """An object that moves in place and returns nothing."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> None:
        self.x = self.x.to(device)


class Scores(Mapping[str, Tensor]):
    """A mapping that cannot be changed."""

    def __getitem__(self, key: str) -> Tensor:
        return {"x": ROWS}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def containers() -> dict[str, Any]:
    return {
        "dict": {"x": ROWS},
        "OrderedDict": OrderedDict(b=ROWS, a=ROWS),
        "defaultdict": defaultdict(list, x=ROWS),
        "dict with an attribute": Options("train", x=ROWS),
        "UserDict": Encoding({"x": ROWS}, 3),
        "named tuple": Point(ROWS, "a"),
        "dataclass": Frozen(ROWS),
        "list": [ROWS, "a"],
        "tuple": (ROWS, 1),
        "nested": [{"a": (ROWS, Point(ROWS, "b"))}],
        "deque": deque([ROWS]),
    }


def tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors(value)]
    if isinstance(batch, Frozen):
        return [batch.x, batch.twice]
    if isinstance(batch, Graph):
        return [batch.x]
    return [t for value in batch for t in tensors(value)] if isinstance(batch, list | tuple | deque) else []


KEPT = [name for name in containers() if name != "deque"]


@pytest.mark.parametrize("name", KEPT)
def test_moved_containers_keep_their_type(name: str) -> None:
    """All tensors move; types, keys, attributes and other values stay."""
    batch = containers()[name]
    moved = move(batch, META)
    assert type(moved) is type(batch)
    assert [t.device for t in tensors(moved)] == [META] * len(tensors(containers()[name]))
    if isinstance(batch, Mapping):
        assert list(moved) == list(batch)
        assert getattr(moved, "__dict__", {}).keys() == getattr(batch, "__dict__", {}).keys()
    if isinstance(batch, defaultdict):
        assert moved["new"] == []
    if isinstance(batch, Point):
        assert moved.name == "a"


@pytest.mark.parametrize("name", KEPT)
def test_a_container_is_not_changed(name: str) -> None:
    """What moves is a copy, unless the container moves itself."""
    batch = containers()[name]
    move(batch, META)
    if name != "UserDict":
        assert all(t.device.type == "cpu" for t in tensors(batch))


def test_objects_that_move_themselves() -> None:
    """A method ``to`` is called; where it returns nothing, the object itself has moved."""
    graph = Graph(ROWS)
    assert move([graph], META)[0] is graph
    assert graph.x.device == META
    packed = move((pack_sequence([ROWS, ROWS[:2]]), 1), META)[0]
    assert isinstance(packed, PackedSequence)
    assert packed.data.device == META


def test_other_values() -> None:
    """Values without tensors keep their type; a mapping that cannot be changed becomes a dict, a sequence a list."""
    for value in ("text", b"bytes", None, 3, torch.float64, range(3), nn.Linear, torch.Size((2, 3))):
        assert move(value, META) == value
        assert type(move(value, META)) is type(value)
    for fixed in (MappingProxyType({"x": ROWS}), Scores()):
        assert move(fixed, META)["x"].device == META
    assert move(deque([ROWS]), META)[0].device == META


@pytest.mark.parametrize("name", KEPT)
def test_shared_containers_keep_their_type(name: str) -> None:
    """Each of two processes gets two of four rows."""
    batch = containers()[name]
    for rank in range(2):
        runtime = object.__new__(nestor.DataParallel)
        runtime.rank, runtime.size = rank, 2
        share = runtime.share(batch)
        assert type(share) is type(batch)
        for part, whole in zip(tensors(share), tensors(batch), strict=True):
            assert torch.equal(part, whole[2 * rank : 2 * rank + 2])


def test_a_shared_packed_sequence() -> None:
    """Its rows are sequences, in the order in which they were packed."""
    sequences = [torch.arange(n, dtype=torch.float64) + 10 * n for n in (2, 4, 1, 3)]
    batch = (pack_sequence(sequences, enforce_sorted=False), torch.arange(4))
    for rank in range(2):
        runtime = object.__new__(nestor.DataParallel)
        runtime.rank, runtime.size = rank, 2
        packed, labels = runtime.share(batch)
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        assert labels.tolist() == [2 * rank, 2 * rank + 1]
        for row, length, wanted in zip(padded, lengths, sequences[2 * rank : 2 * rank + 2], strict=True):
            assert torch.equal(row[:length], wanted)


# Integers and booleans


class Counting(nn.Module):
    """Integer and boolean buffers, and an integer parameter that nothing optimizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4).double()
        self.register_buffer("labels", torch.tensor([0, 1, 2, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("count", torch.tensor(0))
        self.offset = nn.Parameter(torch.tensor([1]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        logits = self.linear(x.double()) * self.mask + self.offset
        return F.cross_entropy(logits, self.labels, reduction="none")


RESPONSES = [
    *(nestor.T1T2(), nestor.T1T2(cross=nestor.ForwardMode()), nestor.FiniteDifference(rel_step=1e-4)),
    *(nestor.Implicit(damping=1.0), nestor.Unrolled(), nestor.ForwardUnrolled(), nestor.SAMA()),
]


@pytest.mark.parametrize("response", RESPONSES, ids=lambda r: r.describe())
def test_integers_and_booleans_are_constants(response: nestor.Response) -> None:
    """In batches, buffers and frozen parameters: the value is that of the same numbers as floats, by every response."""
    batch = {"x": torch.arange(12).view(4, 3) % 5, "keep": torch.tensor([True, True, False, True])}

    def run(batch: Any, masked: Any) -> Tensor:
        net, w = Counting(), nestor.Variable(torch.linspace(-1, 1, 4, dtype=torch.float64))

        def train(batch: Any, net: nn.Module, w: nestor.Variable) -> Tensor:
            return (masked(w(), batch["keep"]).exp() * net(batch["x"])).mean()

        def valid(batch: Any, net: nn.Module) -> Tensor:
            return net(batch["x"] + 1).mean()

        program = nestor.Program(
            net=nestor.Problem(
                net,
                train,
                data=[batch],
                response=response,
                optimizer=torch.optim.SGD(net.linear.parameters(), lr=0.1),
                unroll_steps=2,
            ),
            w=nestor.Problem(w, valid, data=[batch], optimizer=torch.optim.SGD(w.parameters(), lr=0.5)),
        )
        value = program.hypergradient("w", {"net": batch, "w": batch})["value"]
        nestor.Engine(program, seed=0).run(6)
        return torch.cat([value, w.value.detach()])

    floats = {key: value.double() for key, value in batch.items()}
    got = run(batch, lambda w, keep: w.where(keep, 0.0))
    torch.testing.assert_close(got, run(floats, lambda w, keep: w * keep), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_an_integer_variable_is_refused(dtype: torch.dtype) -> None:
    """The error names the type and the remedy."""
    with pytest.raises(TypeError, match=rf"floating-point tensor, got {dtype}; write tensor.float\(\)"):
        nestor.Variable(torch.zeros(3, dtype=dtype))


class Labelled(UserDict[str, Any]):
    """A mapping like the batches of tokenizers."""


def take(batch: Any) -> tuple[Tensor, Tensor]:
    """Take a batch apart in place, as code around tokenizers does."""
    if isinstance(batch, list):
        return batch.pop(0), batch.pop(0)
    inner = batch.pop("inner")
    return inner.pop("x"), batch.pop("labels")


def look(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch[0], batch[1]) if isinstance(batch, list) else (batch["inner"]["x"], batch["labels"])


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, y: {"inner": {"x": x}, "labels": y},
    "UserDict": lambda x, y: Labelled({"inner": {"x": x}, "labels": y}),
    "list": lambda x, y: [x, y],
}
TAKING = {"T1T2": nestor.T1T2(), "Unrolled": nestor.Unrolled(), "FiniteDifference": nestor.FiniteDifference()}


@pytest.mark.parametrize(
    ("name", "kind", "compile"), [*((name, kind, False) for name in TAKING for kind in KINDS), ("T1T2", "dict", True)]
)
def test_a_loss_may_take_its_batch_apart(name: str, kind: str, compile: bool) -> None:
    """Every evaluation gets containers of its own, and the data stay whole."""

    def run(read: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(0)
        net, w = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(1).double())
        data = [KINDS[kind](torch.randn(4, 3).double(), torch.randn(4, 1).double()) for _ in range(3)]

        def low(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
            x, y = read(batch)
            return (w().exp() * (net(x) - y).square()).mean()

        def top(batch: Any, net: nn.Module) -> Tensor:
            x, y = read(batch)
            return (net(x) + y).square().mean()

        program = nestor.Program(
            net=nestor.Problem(
                net,
                low,
                data=data,
                optimizer=torch.optim.SGD(net.parameters(), 0.05),
                unroll_steps=2,
                accumulate=1 if compile else 2,
                response=TAKING[name],
            ),
            w=nestor.Problem(w, top, data=data, optimizer=torch.optim.SGD(w.parameters(), 0.1)),
        )
        nestor.Engine(program, seed=0, compile=compile).run(6)
        return [p.detach() for p in (*net.parameters(), *w.parameters())], data

    found, data = run(take)
    wanted, _ = run(look)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert all(len(look(batch)) == 2 for batch in data)
