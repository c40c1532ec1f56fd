"""A state meets a program: what must be the same, what may differ, and going back in place."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import nestor
from nestor.callbacks import EarlyStopping
from nestor.checkpoints.folder import pack, unpack
from nestor.training.level_checkpoint import ENTRIES, level_state_dict, on_device

OPTIMIZERS = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "RMSprop": torch.optim.RMSprop}


def engine(
    *,
    size: int = 8,
    optimizer: str = "Adam",
    name: str = "n",
    rows: int = 40,
    dtype: torch.dtype = torch.float32,
    scheduled: bool = False,
    unroll: int = 2,
    response: nestor.Response | None = None,
    lr: float = 0.01,
    groups: int = 1,
    batch: int = 8,
    accumulate: int = 1,
    buffers: bool = False,
    callbacks: Iterable[Any] | None = None,
    **options: Any,
) -> nestor.Engine:
    torch.manual_seed(0)
    middle: nn.Module = nn.BatchNorm1d(size) if buffers else nn.Tanh()
    net = nn.Sequential(nn.Linear(4, size), middle, nn.Linear(size, 1)).to(dtype)
    data = DataLoader(TensorDataset(torch.randn(rows, 4, dtype=dtype)), batch_size=batch, shuffle=True)
    params: Any = (
        net.parameters() if groups == 1 else [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
    )
    descent = OPTIMIZERS[optimizer](params, lr)
    w = nestor.Variable(torch.zeros(4, dtype=dtype))

    def fit(batch: Any, n: Any, w: Any) -> Any:
        return (n(batch[0] * w().exp()) ** 2).mean()

    def judge(n: Any, w: Any) -> Any:
        return (n(w()[None]) - 1).square().sum()

    levels = {
        name: nestor.Problem(
            net,
            fit,
            data=data,
            optimizer=descent,
            unroll_steps=unroll,
            response=response,
            accumulate=accumulate,
            reads={"n": name},
            scheduler=torch.optim.lr_scheduler.StepLR(descent, 3) if scheduled else None,
        ),
        "w": nestor.Problem(w, judge, reads={"n": name}, optimizer=torch.optim.SGD(w.parameters(), 0.1)),
    }
    stopping = [EarlyStopping(f"{name}/loss", patience=100)] if callbacks is None else callbacks
    return nestor.Engine(nestor.Program(**levels), seed=1, callbacks=tuple(stopping), **options)


@pytest.fixture(scope="module")
def saved() -> Any:
    one = engine()
    with warnings.catch_warnings(action="ignore"):
        one.run(7)
    return pack(one.state_dict())


def everything(one: nestor.Engine) -> str:
    """What a refused state must not have changed."""
    found: list[Any] = [one.step, one.seed, one.first_step, one.validation]
    for state in one.states.values():
        found += [state.steps, state.draws.count, state.ready, sorted(state.level.problem.module.state_dict().items())]
        if state.level.problem.optimizer is not None:
            found.append(copy.deepcopy(state.level.problem.optimizer.state_dict()))
        if state.level.problem.scheduler is not None:
            found.append(state.level.problem.scheduler.state_dict())
    return repr(found) + repr([callback.state_dict() for callback in one.callbacks])


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "layer size": (
        {"size": 9},
        r"level 'n', variables, 0\.weight: float32 \[8, 4\] in the checkpoint, float32 \[9, 4\]",
    ),
    "level name": ({"name": "m"}, "levels: n, w in the checkpoint, m, w here"),
    "optimizer": ({"optimizer": "SGD"}, r"level 'n', optimizer: torch\.optim\.adam\.Adam in"),
    "another optimizer": ({"optimizer": "RMSprop"}, "optimizer"),
    "groups": ({"groups": 2}, r"level 'n', groups: \[4\] in the checkpoint, \[2, 2\] here"),
    "scheduler": ({"scheduled": True}, "level 'n', scheduler: none in the checkpoint"),
    "dtype": ({"dtype": torch.float64}, "float64"),
    "buffers": ({"buffers": True}, "level 'n', buffers, 1.running_mean: none in the checkpoint"),
    "unroll_steps": ({"unroll": 5}, "level 'n', unroll_steps: 2 in the checkpoint, 5 here"),
    "response": ({"response": nestor.Unrolled()}, "level 'n', response"),
    "solver": ({"response": nestor.Implicit(solver=nestor.Nystrom())}, "level 'n', response"),
    "accumulate": ({"accumulate": 2}, "level 'n', accumulate: 1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_program_is_refused_before_anything_changes(saved: Any, case: str) -> None:
    options, message = OTHERS[case]
    one = engine(**options)
    before = everything(one)
    with pytest.raises(nestor.CheckpointError, match=message):
        one.load_state_dict(unpack(saved))
    assert everything(one) == before


def test_all_differences_are_said_in_one_message(saved: Any) -> None:
    with pytest.raises(nestor.CheckpointError) as caught:
        engine(size=9, optimizer="SGD", unroll=5).load_state_dict(unpack(saved))
    assert all(word in str(caught.value) for word in ("0.weight", "2.weight", "optimizer", "unroll_steps"))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"lr": 0.5}, r"level 'n', hyperparameters 0, lr: 0\.01 in the checkpoint, 0\.5 here"),
    "data": ({"rows": 20}, "level 'n', batches: 5 in the checkpoint, 3 here"),
    "batch size": ({"batch": 4}, "level 'n', batches: 5 in the checkpoint, 10 here"),
    "no callback": ({"callbacks": []}, "callbacks"),
    "another callback": ({"callbacks": [nestor.callbacks.Memory(), EarlyStopping("n/loss", patience=100)]}, "Memory"),
    "precision": ({"precision": "bf16"}, "precision: fp32 in the checkpoint, bf16 here"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_other_settings_are_one_warning(saved: Any, case: str) -> None:
    """The run goes on with the saved learning rate."""
    options, message = SETTINGS[case]
    one = engine(**options)
    with pytest.warns(nestor.NestorWarning) as caught:
        one.load_state_dict(unpack(saved))
    with warnings.catch_warnings(action="ignore"):
        one.run(3)
    texts = [str(warning.message) for warning in caught if "other settings" in str(warning.message)]
    assert len(texts) == 1
    import re

    assert re.search(message, texts[0])
    optimizer = one.program.levels["n"].problem.optimizer
    assert optimizer is not None
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.filterwarnings("ignore:The checkpoint was saved by:nestor.NestorWarning")
@pytest.mark.filterwarnings("ignore:Level 'n'. its data has no state_dict:nestor.NestorWarning")
def test_callbacks_find_their_states_by_class(saved: Any) -> None:
    """Not by position; a warning names what is lost."""
    state = unpack(saved)
    stopping = EarlyStopping("n/loss", patience=100)
    engine(callbacks=[nestor.callbacks.Memory(), stopping]).load_state_dict(state)
    assert stopping.state_dict() == state["callbacks"][0][1]
    with pytest.warns(nestor.NestorWarning, match=r"EarlyStopping: lost"):
        engine(callbacks=[]).load_state_dict(state)


@pytest.mark.parametrize("entry", ["version", "program", "step", "modules", "states", "generators", "callbacks"])
def test_an_incomplete_state_is_refused(saved: Any, entry: str) -> None:
    one = engine()
    before, state = everything(one), unpack(saved)
    del state[entry]
    with pytest.raises(nestor.CheckpointError, match=entry):
        one.load_state_dict(state)
    assert everything(one) == before


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_an_incomplete_state_of_a_level_is_refused(saved: Any, entry: str) -> None:
    one = engine()
    before, state = everything(one), unpack(saved)
    del state["states"]["n"][entry]
    with pytest.raises(nestor.CheckpointError, match=rf"level 'n'.* no {entry}"):
        one.load_state_dict(state)
    assert everything(one) == before


def test_the_entries_are_those_of_a_state() -> None:
    one = engine()
    levels = {name: state.level for name, state in one.states.items()}
    assert level_state_dict(one.states["n"], levels).keys() == ENTRIES


def test_a_state_goes_to_the_device_of_its_level() -> None:
    """Batches, recorded states and solves; counters stay on the CPU, where optimizers read them."""
    one = engine(response=nestor.Unrolled(), callbacks=[])
    with warnings.catch_warnings(action="ignore"):
        one.run(3)
    saved = unpack(pack(one.state_dict()))["states"]["n"]
    moved = on_device(saved, torch.device("meta"))
    history = moved["history"]
    (batch, _, _) = history["draws"][0]
    assert [tensor.device.type for tensor in batch] == ["meta"]
    state = next(iter(history["states"].values()))
    assert {p.device.type for p in state["params"]} == {"meta"}
    assert {slot["exp_avg"].device.type for slot in state["slots"]} == {"meta"}
    assert {slot["step"].device.type for slot in state["slots"]} == {"cpu"}
    assert moved["optimizer"] is saved["optimizer"]
    assert on_device(saved, torch.device("cpu")) == dict(saved)


def test_loading_copies() -> None:
    """The same state loaded twice gives the same run twice, and the caller's tensors do not change."""

    def make() -> nestor.Engine:
        v = nestor.Variable(torch.ones(2))
        problem = nestor.Problem(v, lambda v: v().square().sum(), optimizer=torch.optim.Adam(v.parameters(), 0.1))
        return nestor.Engine(nestor.Program(v=problem), seed=0)

    one = make()
    one.run(3)
    state = unpack(pack(one.state_dict()))
    reference = pack(state)
    results = []
    for _ in range(2):
        other = make()
        other.load_state_dict(state)
        other.run(5)
        results.append(other.program.levels["v"].parameters[0].tolist())
    assert results[0] == results[1]
    again = pack(state)
    assert again.state == reference.state
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in reference.tensors.items())


class Augmented(Dataset[Any]):
    """Rows with noise of a generator of the dataset's own."""

    def __init__(self, kind: str) -> None:
        self.x = torch.arange(12.0)
        self.rng: Any = np.random.default_rng(3) if kind == "numpy" else np.random.RandomState(3)
        if kind == "random":
            import random

            self.rng = random.Random(3)
        self.kind = kind

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        noise = self.rng.gauss(0, 1) if self.kind == "random" else self.rng.standard_normal()
        return self.x[index] + float(noise)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (torch.tensor([float(i)]) + torch.randn(1) for i in range(12))


class Global(Augmented):
    """Rows with noise of numpy's and Python's global generators."""

    def __getitem__(self, index: int) -> Any:
        import random

        return self.x[index] + np.random.randn() + random.gauss(0, 1)  # noqa: NPY002


def _closure() -> Any:
    generator = torch.Generator().manual_seed(5)
    collate = lambda rows: torch.stack(rows) + torch.randn(len(rows), generator=generator)  # noqa: E731
    return DataLoader(torch.arange(12.0), batch_size=4, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


def _stateful() -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(
        torch.arange(12.0), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2)
    )


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.arange(4.0), torch.arange(4.0, 8.0), torch.arange(8.0, 12.0)],
    "shuffle": lambda: DataLoader(torch.arange(12.0), batch_size=4, shuffle=True),  # type: ignore[arg-type]
    "generator": lambda: DataLoader(
        torch.arange(12.0),  # type: ignore[arg-type]
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
    ),
    "sampler": lambda: DataLoader(
        torch.arange(12.0),  # type: ignore[arg-type]
        batch_size=4,
        sampler=torch.utils.data.RandomSampler(range(12), generator=torch.Generator().manual_seed(1)),
    ),
    "workers": lambda: DataLoader(
        torch.arange(12.0),  # type: ignore[arg-type]
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
        num_workers=1,
    ),
    "persistent workers": lambda: DataLoader(
        torch.arange(12.0),  # type: ignore[arg-type]
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
        num_workers=1,
        persistent_workers=True,
    ),
    "persistent workers, global": lambda: DataLoader(
        torch.arange(12.0),  # type: ignore[arg-type]
        batch_size=4,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    ),
    "numpy": lambda: DataLoader(Augmented("numpy"), batch_size=4, shuffle=True),
    "RandomState": lambda: DataLoader(Augmented("state"), batch_size=4, shuffle=True),
    "random": lambda: DataLoader(Augmented("random"), batch_size=4, shuffle=True),
    "global": lambda: DataLoader(Global("numpy"), batch_size=4, shuffle=True),
    "closure": _closure,
    "iterable": lambda: DataLoader(Streamed(), batch_size=4),
    "stateful": _stateful,
}


def drawing(kind: str) -> tuple[nestor.Engine, list[Any]]:
    seen: list[Any] = []
    v = nestor.Variable(torch.zeros(1))

    def loss(batch: Any, v: Any) -> Any:
        seen.append(batch.flatten().tolist())
        return (v() - batch.mean()).square().sum()

    problem = nestor.Problem(v, loss, data=LOADERS[kind](), optimizer=torch.optim.SGD(v.parameters(), 0.1))
    return nestor.Engine(nestor.Program(v=problem), seed=0), seen


@pytest.mark.filterwarnings("ignore:Level 'v'. its data has no state_dict:nestor.NestorWarning")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("cut", [2, 3, 4, 7])
@pytest.mark.parametrize("kind", LOADERS)
def test_data_resume_bitwise(kind: str, cut: int) -> None:
    """In a new process (another engine) and in place, at the end of an epoch and in its middle."""
    whole, expected = drawing(kind)
    whole.run(11)
    first, _ = drawing(kind)
    first.run(cut)
    packed = pack(first.state_dict())
    other, seen = drawing(kind)
    other.load_state_dict(unpack(packed))
    other.run(11 - cut)
    assert seen == expected[cut:]
    first.run(5)
    first.load_state_dict(unpack(packed))
    first.run(11 - cut)
    assert torch.equal(first.program.levels["v"].parameters[0], whole.program.levels["v"].parameters[0])


def test_an_iterator_cannot_go_back() -> None:
    """It is said before anything changes; a new engine with a new iterator resumes."""

    def make() -> nestor.Engine:
        v = nestor.Variable(torch.zeros(1))
        data = (torch.tensor(float(i)) for i in range(100))
        problem = nestor.Problem(
            v, lambda batch, v: (v() - batch).square().sum(), data=data, optimizer=torch.optim.SGD(v.parameters(), 0.1)
        )
        return nestor.Engine(nestor.Program(v=problem), seed=0)

    one, whole = make(), make()
    one.run(4)
    whole.run(9)
    state = unpack(pack(one.state_dict()))
    one.run(2)
    before = everything(one)
    with pytest.raises(nestor.CheckpointError, match=r"level 'v'.*iterator, of which 6 batches were read.*batch 4"):
        one.load_state_dict(state)
    assert everything(one) == before
    other = make()
    with pytest.warns(nestor.NestorWarning, match="drawn again"):
        other.load_state_dict(state)
    other.run(5)
    assert torch.equal(other.program.levels["v"].parameters[0], whole.program.levels["v"].parameters[0])


@pytest.mark.filterwarnings("ignore:Level 'fast'. its data has no state_dict:nestor.NestorWarning")
@pytest.mark.filterwarnings("ignore:Level 'meta'. its data has no state_dict:nestor.NestorWarning")
@pytest.mark.parametrize("cut", [3, 4, 6])
def test_episodes_and_tasks_go_back_in_place(cut: int) -> None:
    def make() -> nestor.Engine:
        torch.manual_seed(0)
        fast, meta = nn.Linear(2, 1), nn.Linear(2, 1)
        pairs = [tuple((torch.randn(3, 4, 2), torch.randn(3, 4, 1)) for _ in range(2)) for _ in range(5)]
        episodes = nestor.Episodes(pairs, steps=2)

        def fit(batch: Any, fast: Any) -> Any:
            return ((fast(batch[0]) - batch[1]) ** 2).mean()

        program = nestor.Program(
            fast=nestor.Problem(
                fast,
                fit,
                data=episodes.support,
                optimizer=torch.optim.Adam(fast.parameters(), 0.1),
                tasks=3,
                init="meta",
                unroll_steps=2,
                response=nestor.Unrolled(),
            ),
            meta=nestor.Problem(meta, fit, data=episodes.query, optimizer=torch.optim.SGD(meta.parameters(), 0.1)),
        )
        return nestor.Engine(program, seed=0)

    whole, one = make(), make()
    whole.run(13)
    one.run(cut)
    state = unpack(pack(one.state_dict()))
    one.run(5)
    for target in (one, make()):
        target.load_state_dict(state)
        target.run(13 - cut)
        for name, level in whole.program.levels.items():
            assert all(map(torch.equal, level.parameters, target.program.levels[name].parameters)), name
