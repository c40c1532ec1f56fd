"""Wrong arguments of every public constructor and function: an error names the argument, or the argument is taken."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor import callbacks, diagnostics, optim

DRAWS = 1_500


def bad_values() -> list[Any]:
    """Values of many types and ranges; for most arguments most of them are wrong."""
    net = nn.Linear(2, 1)
    return [
        *(
            "three",
            "",
            b"bytes",
            None,
            Ellipsis,
            object(),
            int,
            float("nan"),
            float("inf"),
            -float("inf"),
            1j,
            0,
            -1,
            -0.5,
        ),
        *(2.5, True, False, [], [1], ["a"], (), (1, 2), {}, {"a": 1}, set(), range(3), slice(1), lambda: 0, 10**400),
        *(
            torch.tensor([1.0, 2.0]),
            torch.tensor(float("nan")),
            torch.tensor(3),
            torch.tensor(1 + 1j),
            torch.tensor(True),
        ),
        *(torch.ones(1, requires_grad=True), nn.Parameter(torch.tensor(0.5)), np.int64(-3), np.float32("nan")),
        *(np.array([1, 2]), np.bool_(True), np.complex64(1j), net, torch.optim.SGD(net.parameters(), lr=0.1)),
        *(
            nestor.T1T2(),
            nestor.T1T2,
            nestor.GMRES(),
            nestor.GMRES,
            nestor.F2SA(),
            callbacks.Memory(),
            callbacks.Memory,
        ),
        *(Path("nowhere"), torch.device("cpu"), torch.float64, nestor.Problem, Exception("raised")),
    ]


def lower(net: nn.Module, weight: nn.Module) -> Tensor:
    return (net(torch.ones(3, 2)) - weight()).square().mean()


def upper(net: nn.Module) -> Tensor:
    return net(torch.ones(3, 2)).square().mean()


def problem_arguments() -> dict[str, Any]:
    net = nn.Linear(2, 1)
    return {"module": net, "loss": lower, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}


def program() -> nestor.Program:
    weight = nestor.Variable(torch.zeros(1))
    return nestor.Program(
        net=nestor.Problem(**problem_arguments()),
        weight=nestor.Problem(weight, upper, optimizer=torch.optim.SGD(weight.parameters(), lr=0.1)),
    )


def run(steps: Any, resume: Any = None) -> Any:
    return nestor.Engine(program(), seed=0).run(steps, resume=resume)


def program_of(nesting: Any = "exact", net: Any = None) -> nestor.Program:
    return nestor.Program(nesting=nesting, net=nestor.Problem(nn.Linear(2, 1), upper) if net is None else net)


def count(program: Any) -> None:
    with diagnostics.count_evaluations(program):
        pass


def step_arguments() -> dict[str, Any]:
    weight = torch.ones(2, requires_grad=True)
    return {"optimizer": torch.optim.SGD([weight], lr=0.1), "params": [weight], "grads": [torch.ones(2)], "state": None}


def functional_arguments() -> dict[str, Any]:
    a = torch.tensor(1.0, requires_grad=True)
    return {"theta": torch.tensor(1.0), "inputs": a}


Make = Callable[..., Any]
PLAIN: list[Make] = [
    *(nestor.T1T2, nestor.SAMA, nestor.FiniteDifference, nestor.FirstOrder, nestor.Implicit, nestor.Unrolled),
    *(nestor.ForwardUnrolled, nestor.EvolutionStrategies, nestor.Stationarity, nestor.FiniteDifferenceHessian),
    *(
        nestor.CentralDifference,
        nestor.ReusedDifference,
        nestor.ReusedGraph,
        nestor.BOME,
        nestor.F2SA,
        nestor.PBGD,
        nestor.ValuePenalty,
    ),
    *(nestor.GMRES, nestor.MINRES, nestor.BiCGSTAB, nestor.ConjugateGradient, nestor.DenseSolve, nestor.Identity),
    *(nestor.LBFGSInverse, nestor.Neumann, nestor.NormalConjugateGradient, nestor.Nystrom, nestor.HutchinsonDiagonal),
    *(nestor.NystromPreconditioner, nestor.ScoreFunction, nestor.SingleDevice, nestor.FullySharded),
    *(callbacks.Agreement, callbacks.LearningRate, callbacks.Memory, callbacks.Progress, callbacks.Throughput),
    callbacks.EMA,
]


class Ruled(torch.optim.SGD):
    """Whose rule may be registered."""


WITH_ARGUMENTS: dict[Make, Callable[[], dict[str, Any]]] = {
    nestor.Problem: problem_arguments,
    nestor.Variable: lambda: {"tensor": torch.ones(2)},
    nestor.Diagonal: lambda: {"values": torch.ones(2)},
    nestor.Episodes: lambda: {"data": [(0, 1)]},
    nestor.Engine: lambda: {"program": program(), "validate": lambda net: {"loss": 0.0}},
    callbacks.OptunaPruning: lambda: {"trial": None, "metric": "net/loss"},
    callbacks.SaveWeights: lambda: {"folder": "unused"},
    run: lambda: {"steps": 1},
    program_of: dict,
    nestor.outputs: lambda: {"tensor": torch.ones(2)},
    nestor.smoothed: lambda: {"function": lambda x: torch.ones(()), "inputs": torch.ones(2)},
    nestor.root: lambda: {"residual": lambda t, a: t, **functional_arguments()},
    nestor.fixed_point: lambda: {"update": lambda t, a: t, **functional_arguments()},
    nestor.best_response: lambda: {"objective": lambda t, a: t**2, **functional_arguments()},
    diagnostics.check_hypergradient: lambda: {
        "program": program(),
        "name": "weight",
        "responses": [nestor.T1T2()],
        "reference": nestor.T1T2(),
        "repetitions": 1,
    },
    count: lambda: {"program": program()},
    optim.functional_step: step_arguments,
    optim.optimizer_state: lambda: {"optimizer": step_arguments()["optimizer"]},
    optim.register_rule: lambda: {"kind": Ruled, "rule": lambda parameter, gradient, slot, group: (parameter, slot)},
    callbacks.BestWeights: lambda: {"metric": "loss"},
    callbacks.EarlyStopping: lambda: {"metric": "loss"},
    callbacks.Checkpoint: lambda: {"folder": "checkpoints"},
    callbacks.CSVLog: lambda: {"path": "log.csv"},
    callbacks.JSONLines: lambda: {"path": "log.jsonl"},
    callbacks.TensorBoard: lambda: {"folder": "board"},
    callbacks.MLflow: lambda: {"experiment": "one"},
    callbacks.WandB: dict,
}
CALLS: dict[Make, Callable[[], Mapping[str, Any]]] = {**dict.fromkeys(PLAIN, dict), **WITH_ARGUMENTS}


def named(make: Make) -> list[str]:
    """The arguments that are passed by name."""
    parameters = inspect.signature(make).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "_"]


def draws() -> Iterator[tuple[Make, str, Any]]:
    """Every argument with some values, in an order drawn from one seed."""
    slots = [(make, name) for make in CALLS for name in named(make)]
    generator = random.Random(0)
    for index in range(DRAWS):
        make, name = slots[index % len(slots)]
        yield make, name, generator.choice(bad_values())


def outcome(make: Make, name: str, value: Any) -> str:
    """What happens: nothing, an error that names the argument, or another one, which is returned."""
    if name in ("steps", "repetitions") and isinstance(value, int) and value > 10:
        return ""  # would run for ever
    if make is nestor.smoothed and name == "function" and callable(value):
        return ""  # raises what the user's function raises
    try:
        made = make(**{**CALLS[make](), name: value})
        repr(made)
        if isinstance(made, nestor.Response | nestor.Reformulation):
            made.describe()
    except (TypeError, ValueError) as error:
        if name in str(error):
            return ""
        return f"{make.__qualname__}({name}={value!r}): {type(error).__name__}: {error}"
    except ImportError:  # a service that is not installed, after its arguments were checked
        return ""
    except Exception as error:
        if isinstance(error, FileNotFoundError | nestor.SolverError) or "torchrun" in str(error):
            return ""  # no mistake of the argument: no such folder, a singular program, one process
        return f"{make.__qualname__}({name}={value!r}): {type(error).__name__}: {error}"
    return ""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_no_raw_message() -> None:
    """No message of Python or torch that does not say which argument is wrong."""
    raw = [text for draw in draws() if (text := outcome(*draw))]
    assert not raw, f"{len(raw)} of {DRAWS}:\n" + "\n".join(raw[:40])


def test_all_public_names_are_drawn() -> None:
    """A name that is added is added here, unless it has no arguments, is an interface, or needs several processes."""
    without = {
        "Condition",
        "CrossDerivative",
        "Curvature",
        "LinearSolver",
        "Preconditioner",
        "Reformulation",
        "Response",
    }
    without |= {
        "Runtime",
        "__version__",
        "load_checkpoint",  # refuses whatever is no folder of a checkpoint: tests/checkpoints
        "register_batch",  # changes the process: tests/checkpoints
        "DataParallel",
        "Program",
        "FixedPoint",
        "ForwardMode",
        "GaussNewton",
        "Hessian",
        "ReverseMode",
    }
    modules = {"callbacks", "diagnostics", "optim"}
    errors = {name for name in nestor.__all__ if "Error" in name or "Warning" in name}
    drawn = {make.__name__ for make in CALLS}
    assert set(nestor.__all__) - errors - modules - without <= drawn
    assert set(callbacks.__all__) - {"Callback", "Logger", "Run"} <= drawn
    assert set(optim.__all__) <= drawn


WRONG: list[tuple[Make, str, Any]] = [
    (nestor.Implicit, "damping", "0.1"),
    (nestor.Implicit, "damping", None),
    (nestor.Implicit, "damping", torch.ones(2)),
    (nestor.Implicit, "damping", torch.tensor(0.1, requires_grad=True)),
    (nestor.Implicit, "solver", nestor.GMRES),
    (nestor.Implicit, "warm_start", "yes"),
    (nestor.GMRES, "max_steps", [3]),
    (nestor.GMRES, "rtol", 1j),
    (nestor.GMRES, "rtol", True),
    (nestor.Neumann, "step_size", 10**400),
    (nestor.Nystrom, "seed", 1.5),
    (nestor.Unrolled, "steps", True),
    (nestor.Unrolled, "checkpoint", None),
    (nestor.ValuePenalty, "most", float("nan")),
    (nestor.Engine, "rollback", "no"),
    (nestor.Engine, "seed", "zero"),
    (nestor.Engine, "callbacks", callbacks.Memory()),
    (nestor.Problem, "unroll_steps", "3"),
    (nestor.Problem, "init", 3),
    (nestor.Problem, "variables", [torch.ones(1)]),
    (run, "steps", None),
    (callbacks.Checkpoint, "asynchronous", 2),
]


@pytest.mark.parametrize(("make", "name", "value"), WRONG, ids=lambda v: v.__name__ if callable(v) else repr(v)[:20])
def test_wrong_arguments_are_refused(make: Make, name: str, value: Any) -> None:
    """Some that were taken, or that failed in the run."""
    with pytest.raises((TypeError, ValueError), match=name):
        make(**{**CALLS[make](), name: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 0.5])
def test_scalars_of_other_libraries(value: Any) -> None:
    """They become Python's."""
    assert nestor.Implicit(damping=value).damping == 0.5
    assert type(nestor.Implicit(damping=value).damping) in (float, np.float64)
    assert nestor.T1T2(scale=value) == nestor.T1T2(scale=0.5)
    assert nestor.GMRES(max_steps=torch.tensor(3)).max_steps == 3
    assert run(np.int64(1)).keys() == run(1).keys()
