"""Weights as files: plain torch, transformers and peft load what the run has trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import nestor
from nestor.callbacks import EMA, BestWeights, Callback, SaveWeights

Make = Callable[..., nestor.Engine]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_every_level_loads_in_plain_torch(make: Make, tmp_path: Path) -> None:
    """Under the names of its state_dict; the folder contains nothing else."""
    engine = make(callbacks=[SaveWeights(tmp_path / "weights")])
    engine.run(5)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["lam.safetensors", "net.safetensors"]
    fresh = make()
    for name, level in fresh.program.levels.items():
        level.problem.module.load_state_dict(load_file(tmp_path / "weights" / f"{name}.safetensors"))
        trained = engine.program.levels[name].problem.module
        assert same(level.problem.module.state_dict(), trained.state_dict())


def test_every_and_levels(make: Make, tmp_path: Path) -> None:
    """During a run, so that a run that an error ends leaves the last ones; compiled runs stop for them."""
    for compile in (False, True):
        folder = tmp_path / str(compile)

        class Fails(Callback):
            def is_due(self, engine: Any, step: int) -> bool:
                return step == 7

            def on_step(self, engine: Any) -> None:
                if engine.step == 7:
                    raise KeyError("broken")

        engine = make(callbacks=[SaveWeights(folder, every=2, levels="net"), Fails()], compile=compile)
        with pytest.raises(KeyError):
            engine.run(10)
        assert [p.name for p in folder.iterdir()] == ["net.safetensors"]
        other = make(compile=compile, callbacks=[SaveWeights(tmp_path / "other", every=2)])
        other.run(6)
        found = load_file(folder / "net.safetensors")
        for key, value in other.program.levels["net"].problem.module.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=0)


class Tied(nn.Module):
    """A language model with one matrix for embedding and output, a view of a buffer, and BatchNorm's integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(12.0).view(3, 4))
        self.register_buffer("column", self.table.t()[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


def test_tied_weights_load_strictly(tmp_path: Path) -> None:
    """safetensors refuses shared memory; the file has all names, and the loaded module is tied as before."""
    torch.manual_seed(0)
    net = Tied()
    x = torch.randint(0, 7, (8,))
    problem = nestor.Problem(
        net,
        lambda batch, net: nn.functional.cross_entropy(net(batch), batch),
        data=[x],
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
    )
    nestor.Engine(nestor.Program(net=problem), callbacks=[SaveWeights(tmp_path)], seed=0).run(3)
    found = load_file(tmp_path / "net.safetensors")
    fresh = Tied()
    fresh.load_state_dict(found, strict=True)
    assert same(fresh.state_dict(), net.state_dict())
    assert fresh.head.weight is fresh.embed.weight
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tasks_are_stacked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    problem = nestor.Problem(
        net,
        lambda batch, net: (net(batch) - 1).square().mean(),
        data=[torch.randn(3, 4, 2)],
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        tasks=3,
    )
    program = nestor.Program(net=problem)
    nestor.Engine(program, callbacks=[SaveWeights(tmp_path)], seed=0).run(3)
    found = load_file(tmp_path / "net.safetensors")
    for task, module in enumerate(program.copies("net")):
        assert same({key: value[task] for key, value in found.items()}, dict(module.state_dict()))


def test_best_weights(make: Make, tmp_path: Path) -> None:
    """The files are those of the best validation, not of the end."""
    scores = iter([3.0, 1.0, 2.0, 4.0])
    best = BestWeights("score", folder=tmp_path)
    engine = make(callbacks=[best], validate=lambda: {"score": next(scores)}, validate_every=1)
    engine.run(4)
    best.restore(engine)
    for name, level in engine.program.levels.items():
        assert same(load_file(tmp_path / f"{name}.safetensors"), level.problem.module.state_dict())
    assert best.best_step == 2


def test_averages(make: Make, tmp_path: Path) -> None:
    """Those of EMA are written, and the run keeps its own variables."""
    ema = EMA(0.5, levels="net")
    engine = make(callbacks=[ema, SaveWeights(tmp_path, average=ema, every=2)])
    engine.run(5)
    assert same(load_file(tmp_path / "net.safetensors"), ema.module("net").state_dict())
    plain = make()
    plain.run(5)
    for name, level in plain.program.levels.items():
        own = engine.program.levels[name].problem.module.state_dict()
        assert same(own, level.problem.module.state_dict())
    assert same(load_file(tmp_path / "lam.safetensors"), own)


def test_a_writing_that_fails_leaves_the_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is complete before it takes the name of the old one."""
    engine = make(callbacks=[SaveWeights(tmp_path)])
    engine.run(2)
    before = (tmp_path / "net.safetensors").read_bytes()
    import safetensors.torch

    def half(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        engine.run(2)
    assert (tmp_path / "net.safetensors").read_bytes() == before


class Odd(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.ones(2))
        self.register_buffer("value", torch.ones(2, dtype=torch.complex128))


def test_what_is_refused(make: Make, tmp_path: Path) -> None:
    """At the start of the run, not at its end."""
    with pytest.raises(ValueError, match=r"SaveWeights\(every=-1\)"):
        SaveWeights(tmp_path, every=-1)
    with pytest.raises(ValueError, match=r"SaveWeights\(levels=\['nett'\]\): the levels of the program are net, lam"):
        make(callbacks=[SaveWeights(tmp_path, levels=["nett"])]).run(1)
    odd, wide = Odd(2, 1), Wide()
    losses: list[tuple[nn.Module, str, Callable[..., Tensor]]] = [
        (odd, "_extra_state", lambda net: net(torch.ones(2)).square().mean()),
        (wide, "value", lambda net: (net.real * net.value.abs()).square().mean()),
    ]
    for net, name, loss in losses:
        problem = nestor.Problem(net, loss, optimizer=torch.optim.SGD(net.parameters(), 0.1))
        for callback in (SaveWeights(tmp_path), BestWeights("value", folder=tmp_path)):
            engine = nestor.Engine(nestor.Program(net=problem), callbacks=[callback], validate=lambda: 0.0)
            with pytest.raises(ValueError, match=f"Level 'net': safetensors cannot hold '{name}'"):
                engine.run(1)
            assert engine.step == 0
    assert not list(tmp_path.iterdir())
