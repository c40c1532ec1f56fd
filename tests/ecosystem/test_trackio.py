"""The logger of the recipe for Trackio, against a stand-in with the signatures of Trackio 0.43.

Trackio itself needs an older pillow than the examples, and a web server, so that it is not installed here.
"""

import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launchers import write_files

import nestor

Record = tuple[int | None, dict[str, Any]]


class Run:
    """As ``trackio.Run``: records what is logged."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.records: list[Record] = []

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.records.append((step, dict(metrics)))


class StandIn(types.ModuleType):
    """As the module ``trackio``: arguments are bound to the signatures of version 0.43."""

    INIT = (
        *("project", "name", "group", "space_id", "server_url", "dataset_id", "bucket_id", "config", "resume"),
        *("settings", "private", "embed", "auto_log_gpu", "gpu_log_interval", "auto_log_cpu", "cpu_log_interval"),
        *("webhook_url", "webhook_min_level"),
    )

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: list[Run] = []
        self.finished = 0

    def init(self, *args: Any, **options: Any) -> Run:
        kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in self.INIT]
        bound = inspect.Signature([kinds[0].replace(default=inspect.Parameter.empty), *kinds[1:]]).bind(
            *args, **options
        )
        self.runs.append(Run(dict(bound.arguments)))
        return self.runs[-1]

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, in the place of the module; the recipe's file can be imported."""
    write_files("logging", tmp_path)
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    monkeypatch.delitem(sys.modules, "trackio_logger", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return stand_in


def engine(*callbacks: nestor.callbacks.Callback) -> nestor.Engine:
    net = nestor.Variable(torch.ones(2))
    sgd = torch.optim.SGD(net.parameters(), lr=0.25)
    program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
    return nestor.Engine(
        program, callbacks=callbacks, validate=lambda net: {"sum": net().sum()}, validate_every=2, seed=0
    )


def logger(**options: Any) -> nestor.callbacks.Logger:
    made: nestor.callbacks.Logger = importlib.import_module("trackio_logger").Trackio("recipes", name="one", **options)
    return made


def test_what_is_logged_is_what_the_engine_reads(service: StandIn) -> None:
    engine(logger()).run(2)
    (run,) = service.runs
    assert run.options == {"project": "recipes", "name": "one", "resume": "never"}
    assert [step for step, _ in run.records] == [1, 2, 2]
    assert [record["net/loss"] for _, record in run.records if "net/loss" in record] == [2.0, 0.5]
    assert [record["validation/sum"] for _, record in run.records if "validation/sum" in record] == [0.5]
    assert service.finished == 1


def test_a_resumed_run_goes_on_in_the_same_run(service: StandIn, tmp_path: Path) -> None:
    for steps in (2, 4):
        engine(logger(), nestor.callbacks.Checkpoint(tmp_path / "run", every=2)).run(steps, resume="latest")
    assert [run.options["resume"] for run in service.runs] == ["allow", "allow"]
    assert [step for step, record in service.runs[1].records if "net/loss" in record] == [3, 4]


def test_an_error_finishes_the_run_once(service: StandIn) -> None:
    class Failing(nestor.callbacks.Callback):
        def on_step(self, engine: nestor.callbacks.Run) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(logger(), Failing()).run(3)
    assert service.finished == 1


def test_an_unknown_option_of_init_is_an_error(service: StandIn) -> None:
    """The stand-in refuses what Trackio would refuse."""
    with pytest.raises(TypeError, match="missing a required argument: 'project'"):
        service.init(name="one")
    with pytest.raises(TypeError, match="unexpected keyword argument 'entity'"):
        service.init("recipes", entity="me")
