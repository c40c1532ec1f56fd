"""A state goes through JSON and tensors without loss; what cannot is refused; a damaged tree runs no code."""

import json
import math
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import nestor
from nestor.checkpoints.encoding import STORED, decode, encode


class Pair(NamedTuple):
    rows: Tensor
    labels: list[int]


@dataclass(frozen=True)
class Sample:
    rows: Tensor
    weight: float = 1.0


@dataclass
class Slotted:
    __slots__ = ("rows",)
    rows: Tensor


class Graph:
    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes


def through(value: Any) -> Any:
    tree, tensors = encode({"value": value})
    return decode(json.loads(json.dumps(tree, allow_nan=False)), tensors)["value"]


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if one.layout is not other.layout:
            return False
        if one.layout is not torch.strided:
            one, other = one.to_dense(), other.to_dense()
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return bool(one.dtype == other.dtype and one.shape == other.shape and (one == other).all())
    if isinstance(one, dict | UserDict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


PLAIN = [
    *(None, True, 3, -(2**80), 0.1, 1e-320, math.inf, -math.inf, math.nan, "text", "\ud800", b"\x00\xff", 1 + 2j),
    *([1, [2]], (1, (2,)), {}, {"$": 1}, {1: "a", "1": "b"}, {(1, 2): 3.0}, {1, 2}, frozenset({"a"})),
    *(deque([1, 2], maxlen=3), OrderedDict(b=1, a=2), Counter("aab"), defaultdict(list, a=[1]), defaultdict(None, a=1)),
    *(slice(1, None, 2), range(3, 9, 2), torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values(value: Any) -> None:
    """Types that JSON lacks come back as they were."""
    assert same(through(value), value)


def test_a_deque_and_a_defaultdict_keep_their_options() -> None:
    assert through(deque([1], maxlen=3)).maxlen == 3
    assert through(defaultdict(list)).default_factory is list
    with pytest.raises(nestor.CheckpointError, match="factory"):
        through(defaultdict(lambda: 0))


@pytest.mark.parametrize("count", [1, 1000], ids=["inline", "file"])
@pytest.mark.parametrize("dtype", [*sorted(STORED, key=str), torch.complex64, torch.complex128, torch.float8_e4m3fn])
def test_tensors_of_every_dtype(dtype: torch.dtype, count: int) -> None:
    """Bit for bit, small ones among the JSON and large ones in the file."""
    value = torch.randint(0, 2, (2, count)).to(dtype)
    found = through(value)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.zeros(3, 0, dtype=torch.int64),
        nn.Parameter(torch.ones(100)).detach(),
        torch.randn(40, 30).t(),
        torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(30, 20)[::2, 1::3],
        torch.randn(100).expand(3, 100),
        torch.randn(50, dtype=torch.complex64).conj(),
        torch.eye(20).to_sparse(),
    ],
    ids=lambda t: f"{t.layout}-{list(t.shape)}",
)
def test_tensors_of_every_layout(value: Tensor) -> None:
    """Values, strides where the memory is dense, and sparse layouts."""
    found = through(value)
    assert same(found, value.resolve_conj())
    if value.shape in [(30, 40), (2, 8, 5, 5)]:
        assert found.stride() == value.stride()


@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")
def test_compressed_tensors() -> None:
    for value in (torch.eye(20).to_sparse_csr(), torch.eye(20).to_sparse_csc()):
        assert same(through(value), value)


def test_jagged_tensors() -> None:
    parts = [torch.randn(n, 4) for n in (3, 1, 5)]
    found = through(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert found.layout is torch.jagged
    assert all(map(torch.equal, found.unbind(), parts))


def test_a_tensor_that_occurs_twice_is_written_once_and_is_one_again() -> None:
    value = torch.randn(1000)
    tree, tensors = encode({"a": value, "b": [value]})
    assert list(tensors) == ["a"]
    found = decode(tree, tensors)
    assert found["a"] is found["b"][0]


def test_the_encoded_tensors_are_copies() -> None:
    value = torch.zeros(1000)
    _, tensors = encode({"modules": {"a": value}})
    value.fill_(1.0)
    assert tensors["modules/a"].sum() == 0


@pytest.mark.parametrize(
    "value",
    [
        *(np.arange(6.0).reshape(2, 3), np.float64(0.1), np.int32(3), np.array(2.0), np.zeros((0, 2)), np.array(["a"])),
        *(np.array([1 + 2j]), np.array(["2020-01-01"], "datetime64[D]"), np.arange(1000), np.array([b"ab"])),
    ],
    ids=lambda v: f"{type(v).__name__}-{v.dtype}-{v.shape}",
)
def test_numpy(value: Any) -> None:
    assert same(through(value), value)


def test_structures_of_the_user() -> None:
    """Dataclasses and named tuples that a module defines, with and without slots; packed sequences."""
    rows = torch.randn(3, 100)
    pair, sample, slotted = through(Pair(rows, [1, 2])), through(Sample(rows, 0.5)), through(Slotted(rows))
    assert type(pair) is Pair
    assert torch.equal(pair.rows, rows)
    assert pair.labels == [1, 2]
    assert type(sample) is Sample
    assert torch.equal(sample.rows, rows)
    assert sample.weight == 0.5
    assert type(slotted) is Slotted
    assert torch.equal(slotted.rows, rows)
    packed = through(pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]))
    assert type(packed) is PackedSequence
    assert packed.batch_sizes.tolist() == [2, 2, 1]


def test_batches_of_hugging_face() -> None:
    """BatchEncoding and model outputs come back with their types."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import CausalLMOutput

    batch = through(transformers.BatchEncoding({"input_ids": torch.arange(300)}))
    assert type(batch) is transformers.BatchEncoding
    assert torch.equal(batch.input_ids, torch.arange(300))
    assert torch.equal(batch.to("cpu")["input_ids"], torch.arange(300))
    output = through(CausalLMOutput(logits=torch.randn(3, 100)))
    assert type(output) is CausalLMOutput
    assert output["logits"].shape == output.logits.shape == (3, 100)
    assert output.loss is None


def test_a_class_of_the_user_is_refused_with_the_remedy() -> None:
    with pytest.raises(nestor.CheckpointError, match=r"Graph at value/batch/0: .*nestor\.register_batch"):
        through({"batch": [Graph(torch.ones(2))]})

    @dataclass
    class Local:
        rows: Tensor

    with pytest.raises(nestor.CheckpointError, match="was defined in a function"):
        through(Local(torch.ones(2)))
    with pytest.raises(nestor.CheckpointError, match="function"):
        through(lambda: 0)
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(nestor.CheckpointError, match="contains itself"):
        through(circle)


def test_a_registered_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from nestor.checkpoints import forms

    monkeypatch.setattr(forms, "_FORMS", dict(forms._FORMS))
    monkeypatch.setattr(forms, "_TAGGED", dict(forms._TAGGED))
    nestor.register_batch(Graph, lambda graph: {"nodes": graph.nodes}, lambda data: Graph(data["nodes"]))
    found = through([Graph(torch.arange(500))])
    assert type(found[0]) is Graph
    assert torch.equal(found[0].nodes, torch.arange(500))
    with pytest.raises(TypeError, match="must be a class"):
        nestor.register_batch(3, list, list)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="know this class already"):
        nestor.register_batch(tuple, list, tuple)
    with pytest.raises(ValueError, match="know this class already"):
        nestor.register_batch(Tensor, list, list)
    with pytest.raises(TypeError, match="from_data"):
        nestor.register_batch(Graph, list, None)  # type: ignore[arg-type]


MALICIOUS = [
    {"$": "structure os.system", "of": ["true"]},
    {"$": "structure subprocess.Popen", "of": {"args": "true"}},
    {"$": "structure builtins.eval", "of": ["1"]},
    {"$": "structure nestor.Problem", "of": {}},
    {"$": "structure no.such.module.Class", "of": []},
    {"$": "os.system", "of": "true"},
    {"$": "dtype", "of": "load"},
    {"$": "float", "of": "1e999999"},
    {"$": "tensor", "name": "missing"},
    {"$": "tensor", "dtype": "float32", "shape": [10**12], "data": "AAAA"},
    {"$": "tensor", "dtype": "float32", "shape": [2], "stride": [10**15], "data": "AACAPwAAgD8="},
    {
        "$": "sparse",
        "layout": "torch.sparse_coo",
        "shape": [2],
        "of": [
            {"$": "tensor", "dtype": "int64", "shape": [1, 1], "data": "ZAAAAAAAAAA="},
            {"$": "tensor", "dtype": "float32", "shape": [1], "data": "AACAPw=="},
        ],
    },
    {"$": "array", "dtype": "O", "shape": [1], "of": [1]},
    {"$": "defaultdict", "of": ["eval", []]},
    {"$": {}, "of": 1},
    {"$": "tuple"},
]


@pytest.mark.parametrize("tree", MALICIOUS, ids=lambda tree: str(tree)[:60])
def test_a_damaged_or_malicious_tree_is_an_error(tree: Any) -> None:
    """It builds nothing that is no data, and no raw exception leaves."""
    with pytest.raises(nestor.CheckpointError):
        decode(tree, {})


def test_reading_imports_nothing() -> None:
    """A class is looked for among the modules that are imported: the name of another is refused, not imported."""
    import sys

    assert "antigravity" not in sys.modules
    with pytest.raises(nestor.CheckpointError, match=r"antigravity\.Flight, which this process does not know"):
        decode({"$": "structure antigravity.Flight", "of": []}, {})
    assert "antigravity" not in sys.modules


def test_nesting_without_end_is_an_error() -> None:
    tree: Any = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(nestor.CheckpointError):
        decode(tree, {})
