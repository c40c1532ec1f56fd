"""What an engine checks before the first step of a run: modes, samplers, hooks that came later."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

import nestor
from nestor import NestorWarning, Problem, Program, UnsupportedError, Variable
from nestor.distributed import Runtime, SingleDevice
from nestor.levels.evaluator import Evaluator

X = torch.linspace(-1, 1, 12).view(4, 3)


def fit(net: Callable[[Tensor], Any], w: Variable) -> Tensor:
    return net(X).square().mean() * w().exp()


def bilevel(net: nn.Module, **options: Any) -> Program:
    w = Variable(torch.zeros(()))
    parameters = options.get("variables", list(net.parameters()))
    return Program(
        net=Problem(net, fit, optimizer=SGD(parameters, lr=0.1), **options),
        w=Problem(
            w, lambda net, w: net(X.flip(1)).square().mean() + w().square(), optimizer=SGD(w.parameters(), lr=0.1)
        ),
    )


# Modes


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(3, 1, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 2, num_layers=2, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


DEPENDENT: list[Callable[[], nn.Module]] = [dropout, norm, lambda: Attention(0.1), lambda: Recurrent(0.1)]
INDEPENDENT: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 1),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.LayerNorm(4)),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
    lambda: Attention(0.0),
    lambda: Recurrent(0.0),
]


@pytest.mark.parametrize("make", DEPENDENT)
def test_a_module_in_eval_mode_warns_once(make: Callable[[], nn.Module]) -> None:
    """At the first step of the engine, at the place of the call; its mode stays as it is."""
    net = make().eval()
    engine = nestor.Engine(bilevel(net), seed=0)
    with pytest.warns(NestorWarning, match=r"level 'net' is in eval mode.*module\.train\(\)") as caught:
        engine.run(1)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    engine.run(1)
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("make", DEPENDENT)
def test_a_module_in_train_mode_is_silent(make: Callable[[], nn.Module]) -> None:
    """Also one that was put into train mode after the engine was built, and after a validation."""
    net = make().eval()
    engine = nestor.Engine(bilevel(net), seed=0, validate=lambda net: net(X).mean(), validate_every=1)
    net.train()
    engine.run(2)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("make", INDEPENDENT)
def test_modules_without_modes_are_silent(make: Callable[[], nn.Module]) -> None:
    nestor.Engine(bilevel(make().eval()), seed=0).run(1)


def test_parts_in_eval_mode() -> None:
    """A pretrained part with variables warns by name; a frozen part and a frozen layer are what somebody wants."""
    net = nn.Sequential(dropout(), nn.Linear(1, 1))
    net[0].eval()
    with pytest.warns(NestorWarning, match=r"level 'net' \(0\) is in eval mode"):
        nestor.Engine(bilevel(net), seed=0).run(1)
    nestor.Engine(bilevel(net, variables=list(net[1].parameters())), seed=0).run(1)
    frozen = norm()
    frozen[1].eval()
    nestor.Engine(bilevel(frozen), seed=0).run(1)


def test_a_pretrained_model(tmp_path: Path) -> None:
    """``from_pretrained`` returns a model in eval mode; after ``train()`` the run is silent."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    net = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    ids, labels = torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1])
    w = Variable(torch.zeros(()))

    def program() -> Program:
        return Program(
            net=Problem(
                net,
                lambda net, w: net(input_ids=ids, labels=labels).loss * w().exp(),
                optimizer=SGD(net.parameters(), lr=0.1),
            ),
            w=Problem(w, lambda net: net(input_ids=ids, labels=labels).loss, optimizer=SGD(w.parameters(), lr=0.1)),
        )

    with pytest.warns(NestorWarning, match="from_pretrained"):
        nestor.Engine(program(), seed=0).run(1)
    net.train()
    nestor.Engine(program(), seed=0).run(1)


# Hooks that came later


@pytest.mark.parametrize("when", ["before the engine", "before the run"])
def test_a_hook_registered_after_the_program(when: str) -> None:
    """Nothing has been stepped when the error is raised."""
    net = nn.Linear(3, 1)
    program = bilevel(net)
    before = net.weight.detach().clone()
    engine = None if when == "before the engine" else nestor.Engine(program, seed=0)
    net.weight.register_hook(torch.neg)
    with pytest.raises(UnsupportedError, match=r"level 'net'.*'weight' has a hook"):
        (engine or nestor.Engine(program, seed=0)).run(1)
    assert torch.equal(net.weight, before)


# Samplers


class Two(Runtime):
    """A runtime that shares batches between two processes, of which only this one is there."""

    size = 2

    def place(self, evaluator: Evaluator) -> Evaluator:
        return evaluator


class Own(RandomSampler):
    """A distributed sampler that somebody has written."""

    def __init__(self, data: TensorDataset) -> None:
        super().__init__(data)
        self.num_replicas, self.rank = 2, 0


DATA = TensorDataset(X)
SPLIT: dict[str, Callable[[], Any]] = {
    "sampler": lambda: DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 2, 0)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, 2, 0), 2, True)),
    "own": lambda: DataLoader(DATA, 2, sampler=Own(DATA)),
}
WHOLE: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(DATA, 2, shuffle=True),
    "one replica": lambda: DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 1, 0)),
    "own batches": lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]),
    "no batches": lambda: DataLoader(DATA, batch_size=None),
    "list": lambda: [(X,)],
}


def with_data(data: Any) -> Program:
    t, w = Variable(torch.zeros(3)), Variable(torch.zeros(()))

    def loss(batch: Any, t: Variable, w: Variable) -> Tensor:
        return (batch[0] @ t() - w()).square().mean()

    return Program(
        t=Problem(
            t, lambda batch, t, w: (batch[0] @ t() - w()).square().mean(), data=data, optimizer=SGD(t.parameters(), 0.1)
        ),
        w=Problem(w, lambda t, w: t().sum() + w(), optimizer=SGD(w.parameters(), 0.1)),
    )


@pytest.mark.parametrize("data", SPLIT)
def test_data_that_is_split_twice(data: str) -> None:
    """Refused where each batch is shared; one process alone may draw a part of its rows."""
    with pytest.raises(UnsupportedError, match=r"level 't', loss .*Two\(\) gives every process.*plain sampler"):
        nestor.Engine(with_data(SPLIT[data]()), seed=0, runtime=Two())
    nestor.Engine(with_data(SPLIT[data]()), seed=0, runtime=SingleDevice()).run(1)


@pytest.mark.parametrize("data", WHOLE)
def test_data_that_is_split_once(data: str) -> None:
    nestor.Engine(with_data(WHOLE[data]()), seed=0, runtime=Two())


def test_ten_runs_warn_once() -> None:
    """Short runs of one engine are one run."""
    engine = nestor.Engine(bilevel(dropout().eval()), seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            engine.run(1)
    assert len(caught) == 1
