"""A run that is killed at any instant goes on bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor.checkpoints.folder import pack, unpack

SCRIPT = Path(__file__).parent / "trilevel.py"


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(steps)], stderr=subprocess.PIPE)


def finished(folder: Path, steps: int) -> list[Tensor]:
    process = start(folder, steps)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    return torch.load(folder / "final.pt")


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def kill_and_resume(tmp_path: Path, kills: int, steps: int) -> None:
    expected = finished(tmp_path / "whole", steps)
    folder = tmp_path / "killed"
    generator = random.Random(0)
    for _ in range(kills):
        process = start(folder, steps)
        begin = time.time()
        metrics = folder / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while time.time() - begin < 60 and process.poll() is None:  # until it runs, then a random while
            if metrics.exists() and metrics.stat().st_size != before:
                break
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.25))
        process.kill()
        process.communicate()
    got = finished(folder, steps)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert logged(folder) == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(folder)] == list(range(1, steps + 1))


def test_kill_and_resume(tmp_path: Path) -> None:
    """Twice, at random instants."""
    kill_and_resume(tmp_path, kills=2, steps=200)


@pytest.mark.slow
def test_kill_and_resume_twenty_times(tmp_path: Path) -> None:
    """``kill -9`` at twenty random instants, during saves too."""
    kill_and_resume(tmp_path, kills=20, steps=2000)


def test_preemption(tmp_path: Path) -> None:
    """SIGTERM: a checkpoint, then status 143; the next process ends what was begun."""
    process = start(tmp_path / "run", 400)
    metrics = tmp_path / "run" / "metrics.jsonl"
    begin = time.time()
    while time.time() - begin < 60 and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    last = logged(tmp_path / "run")[-1]["step"]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[-1] == f"step-{last:08d}"
    got = finished(tmp_path / "run", 400)
    expected = finished(tmp_path / "whole", 400)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def run_pair(make: Any, steps: int, cut: int) -> None:
    """A run cut in two by ``state_dict`` equals one that is not."""
    whole = make()
    nestor.Engine(whole, seed=0).run(steps)
    first = nestor.Engine(make(), seed=0)
    first.run(cut)
    second = make()
    engine = nestor.Engine(second, seed=123)
    engine.load_state_dict(unpack(pack(first.state_dict())))
    engine.run(steps - cut)
    for name, level in whole.levels.items():
        for a, b in zip(level.parameters, second.levels[name].parameters, strict=True):
            assert torch.equal(a, b), name


RESPONSES = {
    "unrolled-tree": nestor.Unrolled(checkpoint="tree"),
    "unrolled-window": nestor.Unrolled(steps=3, checkpoint="step"),
    "sama": nestor.SAMA(),
    "nystrom": nestor.Implicit(solver=nestor.Nystrom(rank=3, refresh=4)),
    "shine": nestor.Implicit(solver=nestor.LBFGSInverse(pairs=4, max_steps=3)),
    "warm": nestor.Implicit(solver=nestor.MINRES(max_steps=2), warm_start=True),
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("cut", [3, 8])
@pytest.mark.filterwarnings("ignore:Level 'net'")
def test_state_of_every_response(name: str, cut: int) -> None:
    """Cut in the middle of an unroll."""

    def make() -> nestor.Program:
        torch.manual_seed(0)
        net, w = nn.Linear(3, 1).double(), nestor.Variable(torch.zeros(8).double())
        x, y = torch.randn(8, 3).double(), torch.randn(8).double()

        def train(batch: Any, net: Any, w: Any) -> Tensor:
            loss = (torch.sigmoid(w()) * (net(batch[0]).squeeze(1) - batch[1]) ** 2).mean()
            return loss + 0.1 * net.weight.square().sum() + 0.1 * net.bias.square().sum()

        return nestor.Program(
            net=nestor.Problem(
                net,
                train,
                data=[(x, y)],
                optimizer=torch.optim.Adam(net.parameters(), lr=0.05),
                unroll_steps=5,
                response=RESPONSES[name],
            ),
            w=nestor.Problem(
                w,
                lambda batch, net: ((net(batch[0]).squeeze(1) - batch[1]) ** 2).mean(),
                data=[(x.flip(1), y)],
                optimizer=torch.optim.Adam(w.parameters(), lr=0.05),
            ),
        )

    run_pair(make, 13, cut)


def test_learned_rate_stays_linked() -> None:
    """The optimizer's hyperparameter is still the variable of the level above."""

    def make() -> nestor.Program:
        theta = nestor.Variable(torch.ones(3).double())
        rate = nestor.Variable(torch.tensor(0.05).double())
        return nestor.Program(
            theta=nestor.Problem(
                theta,
                lambda theta: (theta() ** 4).sum(),
                optimizer=torch.optim.SGD(theta.parameters(), lr=rate.value),
                unroll_steps=3,
                response=nestor.Unrolled(),
            ),
            rate=nestor.Problem(
                rate, lambda theta: (theta() ** 2).sum(), optimizer=torch.optim.SGD(rate.parameters(), lr=1e-3)
            ),
        )

    run_pair(make, 12, 5)


def test_tasks_and_update_rules() -> None:
    """Stacks and the memory of rules of one's own."""

    def make() -> nestor.Program:
        torch.manual_seed(0)
        fast, meta = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()
        batch = (torch.randn(3, 4, 2).double(), torch.randn(3, 4, 1).double())

        def fit(batch: Any, fast: Any) -> Tensor:
            return ((fast(batch[0]) - batch[1]) ** 2).mean()

        return nestor.Program(
            fast=nestor.Problem(
                fast,
                fit,
                data=[batch],
                optimizer=torch.optim.Adam(fast.parameters(), lr=0.1),
                tasks=3,
                init="meta",
                unroll_steps=4,
                response=nestor.Unrolled(),
            ),
            meta=nestor.Problem(meta, fit, data=[batch], update=heavy_ball),
        )

    def heavy_ball(params: Any, grads: Any, state: Any) -> Any:
        state = state or {f"v{i}": torch.zeros_like(g) for i, g in enumerate(grads)}
        state = {f"v{i}": 0.9 * state[f"v{i}"] + g for i, g in enumerate(grads)}
        return [p - 0.01 * v for p, v in zip(params, state.values(), strict=True)], state

    run_pair(make, 14, 6)


def test_state_of_another_program_is_refused() -> None:
    """Before anything changes."""
    net = nn.Linear(2, 1)
    one = nestor.Engine(
        nestor.Program(
            a=nestor.Problem(net, lambda a: a.weight.sum(), optimizer=torch.optim.SGD(net.parameters(), 0.1))
        )
    )
    state = one.state_dict()
    other_net = nn.Linear(3, 1)
    two = nestor.Engine(
        nestor.Program(
            a=nestor.Problem(
                other_net, lambda a: a.weight.sum(), optimizer=torch.optim.SGD(other_net.parameters(), 0.1)
            )
        )
    )
    before = other_net.weight.detach().clone()
    with pytest.raises(nestor.CheckpointError, match=r"level 'a', variables, weight: float32 \[1, 2\]"):
        two.load_state_dict(state)
    assert torch.equal(before, other_net.weight)
    state["states"] = {"b": state["states"]["a"]}
    with pytest.raises(nestor.CheckpointError, match=r"level 'a'.*The state has no constants, draws"):
        one.load_state_dict(state)
    with pytest.raises(ValueError, match="has no Checkpoint"):
        one.run(1, resume="latest")


def test_checkpoints_are_kept_and_whole(tmp_path: Path) -> None:
    """The newest two; each loads; nothing half written stays."""
    net = nn.Linear(2, 1)
    saver = nestor.callbacks.Checkpoint(tmp_path, every=2, keep=2)
    program = nestor.Program(
        a=nestor.Problem(net, lambda a: a.weight.square().sum(), optimizer=torch.optim.SGD(net.parameters(), 0.1))
    )
    (tmp_path / "step-00000099.partial").mkdir()
    nestor.Engine(program, callbacks=[saver], seed=0).run(9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000009"]
    assert nestor.load_checkpoint(tmp_path / "step-00000008")["step"] == 8
    assert saver.latest() == tmp_path / "step-00000009"
    with pytest.raises(FileNotFoundError, match="contains no checkpoint"):
        nestor.load_checkpoint(tmp_path / "step-00000001")
    again = nestor.Engine(program, callbacks=[saver], seed=0)
    assert again.run(9, resume="latest") is not None
    assert again.step == 9


def test_any_callback_can_find_the_latest_checkpoint(tmp_path: Path) -> None:
    """The engine asks the first callback that overrides ``latest``; without a checkpoint the run starts anew."""
    net = nn.Linear(2, 1)
    program = nestor.Program(
        a=nestor.Problem(net, lambda a: a.weight.square().sum(), optimizer=torch.optim.SGD(net.parameters(), 0.1))
    )
    nestor.Engine(program, callbacks=[nestor.callbacks.Checkpoint(tmp_path)], seed=0).run(3)

    class Finder(nestor.callbacks.Callback):
        folder: Path | None = None

        def latest(self) -> Path | None:
            return self.folder

    finder = Finder()
    engine = nestor.Engine(program, callbacks=[nestor.callbacks.Throughput(), finder], seed=0)
    engine.run(2, resume="latest")
    assert (engine.first_step, engine.step) == (0, 2)
    finder.folder = tmp_path / "step-00000003"
    with pytest.warns(nestor.NestorWarning, match=r"callbacks: \['nestor.callbacks.checkpoint.Checkpoint'\] in the"):
        engine.run(5, resume="latest")
    assert (engine.first_step, engine.step) == (0, 5)


def test_stateful_data_jumps(tmp_path: Path) -> None:
    """Data that keeps its own state is not drawn again."""

    class Counter:
        def __init__(self) -> None:
            self.position = 0
            self.made = 0

        def __iter__(self) -> Any:
            while True:
                self.position += 1
                self.made += 1
                yield torch.tensor(float(self.position))

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    def make() -> tuple[nestor.Engine, Counter, nn.Linear]:
        torch.manual_seed(0)
        net, data = nn.Linear(1, 1), Counter()
        program = nestor.Program(
            a=nestor.Problem(
                net,
                lambda batch, a: (a.weight * batch - 1).square().sum(),
                data=data,
                optimizer=torch.optim.SGD(net.parameters(), lr=1e-4),
            )
        )
        return nestor.Engine(program, seed=0), data, net

    whole, _, expected = make()
    whole.run(9)
    first, _, _ = make()
    first.run(4)
    second, data, got = make()
    second.load_state_dict(first.state_dict())
    second.run(5)
    assert data.made == 5
    assert torch.equal(got.weight, expected.weight)


def test_learned_betas_stay_linked() -> None:
    """The hyperparameters of a tuple, entries of one variable, are still that variable; with rollback too."""

    def make() -> nestor.Program:
        theta = nestor.Variable(torch.ones(3).double())
        betas = nestor.Variable(torch.tensor([0.5, 0.9]).double())
        first, second = betas.value.unbind()
        return nestor.Program(
            theta=nestor.Problem(
                theta,
                lambda theta: (theta() ** 4).sum(),
                optimizer=torch.optim.Adam(theta.parameters(), lr=0.05, betas=(first, second)),  # type: ignore[arg-type]
                unroll_steps=3,
                response=nestor.Unrolled(),
            ),
            betas=nestor.Problem(
                betas, lambda theta: (theta() ** 2).sum(), optimizer=torch.optim.SGD(betas.parameters(), lr=1e-2)
            ),
        )

    run_pair(make, 12, 5)
    built = make()
    nestor.Engine(built, seed=0, rollback=True).run(6)
    held = built.levels["theta"].problem.optimizer.param_groups[0]["betas"]  # type: ignore[union-attr]
    assert [b.item() for b in held] == built.levels["betas"].parameters[0].tolist()
