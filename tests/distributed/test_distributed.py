"""Several gloo processes under torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.distributed


def torchrun(script: str, processes: int, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, f"--nproc-per-node={processes}", str(HERE / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def check_equivalence(processes: int, tmp_path: Path) -> None:
    process = torchrun("equivalence.py", processes, str(tmp_path / "errors.json"))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output.decode()[-3000:]
    errors = json.loads((tmp_path / "errors.json").read_text())
    wrong = {name: error for name, error in errors.items() if not isinstance(error, float) or error > 1e-10}
    assert not wrong
    assert len(errors) >= 36


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Twenty-step trajectories and metrics, every response, replicated and sharded, bilevel and trilevel: 1e-10."""
    check_equivalence(2, tmp_path)


def test_sharding_stays_in_its_engine(tmp_path: Path) -> None:
    """Best responses, clipped steps and other engines of the process: bitwise as without a FullySharded engine."""
    process = torchrun("spaces.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output.decode()[-3000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["compared"] == 9
        assert result["during"] == result["after"] == result["again"] == []
        assert result["error"] < 1e-10


def test_what_compares_all_entries(tmp_path: Path) -> None:
    """The floor of a preconditioner is that of whole vectors; responses that move single variables are refused."""
    process = torchrun("shards.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["error"] < 1e-12
        assert "level 'theta'" in result["refusals"][0]
        assert "ForwardUnrolled() moves single upper variables" in result["refusals"][0]
        assert "EvolutionStrategies" in result["refusals"][1]


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    """Every response, replicated and sharded: a block that is evaluated again in the backward pass, with dropout."""
    process = torchrun("checkpointing.py", 2, str(tmp_path / "errors.json"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output.decode()[-3000:]
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert not {name: error for name, error in errors.items() if error != 0}
    assert len(errors) == 28


def test_what_is_refused(tmp_path: Path) -> None:
    """Wrapped modules and samplers that split the rows, in every process; the remedy sees all rows."""
    process = torchrun("refused.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert "Engine(program, runtime=nestor.DataParallel())" in result["DDP"]
        assert "Engine(program, runtime=nestor.FullySharded())" in result["FSDP"]
        for runtime in ("DataParallel", "FullySharded"):
            assert "DistributedSampler, which gives every process a part of the rows" in result[runtime]
            assert "plain sampler" in result[runtime]
        assert len(result["alone"]) == 1
        assert "runtime=nestor.DataParallel()" in result["alone"][0]
        assert sorted(row for rows in result["seen"] for row in rows) == list(range(16))


def test_checks_of_a_run(tmp_path: Path) -> None:
    """As in one process, and alike in all: also what only one process draws, or only its shard shows."""
    process = torchrun("guards.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, result in enumerate(results):
        for runtime, found in result.items():
            assert found["plain"] == found["projected, not replayed"] == found["kept"] == ""
            assert found["drawn"].startswith("NotAFunctionError: [level 'net'")
            assert ("another process" in found["drawn"]) == (rank == 0)
            assert found["timed"].startswith("ReplayError: [level 'net'")
            assert found["projected"].startswith("ReplayError: [level 'net'")
            assert found["reset"].startswith("ReplayError: [level 'net'")
            assert "in the optimizer's memory 'momentum_buffer'" in found["reset"]
            assert "frozen: '0.bias' of level 'net'" in found["frozen"]
            assert "the variable '0.bias' has a hook" in found["hooked"]
            assert "in eval mode" in found["asleep"]
            is_freed = "clamp_ was called on a parameter of a module that holds no values" in found["touched"]
            assert is_freed == (runtime == "sharded")
            assert "engine.runtime.whole_modules()" in found["touched"] or not is_freed
            assert found["touched"] == "" or is_freed
    assert [set(result) for result in results] == [{"data", "sharded"}] * 2


DIFFERENCES = {
    "features": "Process 1 has level 'net', variables, weight float32 [1, 5], process 0 has level 'net'",
    "dtype": "Process 1 has level 'net', variables, weight float64 [1, 3], process 0 has",
    "optimizer": "optimizer torch.optim.adam.Adam, process 0 has level 'net', optimizer torch.optim.sgd.SGD",
    "response": "process 0 has level 'net', response T1T2()",
    "unroll_steps": "Process 1 has level 'net', unroll_steps 2, process 0 has level 'net', unroll_steps 1",
    "rows": "rows DataLoader of 20 rows in batches of 4, process 0 has level 'net', rows DataLoader of 16 rows",
    "level": "Process 1 has levels net, v, process 0 has levels net, w",
    "seed": "Process 1 has seed 1, process 0 has seed 0",
    "callbacks": "EarlyStopping'], process 0 has callbacks []",
    "precision": "Process 1 has precision bf16, process 0 has precision fp32",
    "runtime": "Process 1 has the runtime FullySharded(), process 0 has the runtime DataParallel()",
    "small batch": "17 rows in batches of 4 leave a batch of 1, which 2 processes cannot share",
    "steps": "Process 1 has steps 4, process 0 has steps 3",
    "other call": "Process 1 has reached engine.run, process 0 has reached Engine(...)",
    "validation": "Process 1 has the metrics a, c, process 0 has the metrics a, b",
    "same": "no error",
}


def test_processes_that_disagree(tmp_path: Path) -> None:
    """One line in every process: which process, and the difference; a process that hangs is named by the others."""
    process = torchrun("disagreeing.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output.decode()[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name, text in DIFFERENCES.items():
        assert text in first[name], name
        assert first[name] == second[name], name
    assert "[level 'net', loss" in first["hanging"]
    assert "all_reduce" in first["hanging"]
    assert "Timed out waiting 5000ms" in first["hanging"]
    assert "Process 1 did not take part" in first["hanging"]
    assert "ProcessError: [level 'net', loss" in second["hanging"]
    assert "Process 1 has not reached Engine(...) within 5 seconds" in first["absent"]


def test_sharded_runs_end_whole(tmp_path: Path) -> None:
    """Best weights, averages, interrupted and signalled runs: modules as in one process, or a named error."""
    process = torchrun("endings.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output.decode()[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        assert result["best"]
        assert result["best is early"]
        assert result["again"] == 14
        assert "UnsupportedError: [level 'net'] sum was called on a parameter of a module" in result["read"]
        assert "with engine.runtime.whole_modules()" in result["read"]
        assert result["module after the error"]
        assert result["average"]
        assert result["interrupted"] == ["KeyboardInterrupt: ", True]
        assert result["goes on"]
        error, last, is_whole = result["signalled"]
        assert error == "SystemExit: 143"
        assert 3 <= last < 900
        assert is_whole
        assert result["seconds"] < 30
        assert "engine.runtime.end() gathers them if all processes call it" in result["alone"]
        assert all("FullySharded() keeps them in shards" in text for text in result["after alone"])
    assert results[0]["signalled"] == results[1]["signalled"]
    assert f"step-{last:08d}" in [path.name for path in (tmp_path / "run").iterdir()]
    assert results[1]["alone"].startswith("KeyboardInterrupt: ")
    assert "Process 1 did not take part" in results[0]["alone"]


def test_a_signal_to_torchrun_saves_once(tmp_path: Path) -> None:
    """torchrun signals the groups of its processes, workers of loaders included: all end after the same step."""
    process = torchrun("../training/signalled.py", 2, str(tmp_path), "processes")
    begin = time.time()
    while time.time() - begin < 90 and not list(tmp_path.glob("step-*0")):
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    ended = [(tmp_path / f"ended-{rank}").read_text().split() for rank in range(2)]
    assert ended[0] == ended[1]
    assert ended[0][0] == "143"
    assert (tmp_path / f"step-{int(ended[0][1]):08d}").is_dir()
    assert "DataLoader worker" not in output.decode()


def test_collectives_to_third_order(tmp_path: Path) -> None:
    """A clipped gradient, its pullbacks, their derivatives in both arguments, and forward mode."""
    process = torchrun("orders.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    for rank in range(2):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not {name: error for name, error in errors.items() if not error < 1e-14}
        assert len(errors) == 16


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path) -> None:
    """And on a two-dimensional mesh."""
    check_equivalence(4, tmp_path)


def test_an_error_on_one_process_ends_all(tmp_path: Path) -> None:
    """Within a minute, with the error of the process that raised."""
    begin = time.time()
    process = torchrun("failure.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.time() - begin < 60
    assert "the loader of process 1 broke" in output.decode()


def test_bad_numbers_stop_all_processes_alike(tmp_path: Path) -> None:
    """A NaN in one process's share: all raise at the same step, and parameters are as before it."""
    process = torchrun("bad_numbers.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0]["step"] == 3
    assert results[0]["unchanged"]


def test_lost_variables_stop_all_processes_alike(tmp_path: Path) -> None:
    """An entry of one process's shard becomes NaN: all raise at the same step and name it; a copy is restored."""
    process = torchrun("lost.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    for kind in ("sharded", "replicated"):
        lost, kept = results[0][kind], results[0][f"{kind}, kept"]
        assert lost["step"] == kept["step"] == 3
        assert lost["lost"] == ["weight"]
        assert not lost["unchanged"]
        assert kept["lost"] == []
        assert kept["unchanged"]
        assert not lost["saved"]
        assert kept["saved"]


def test_averages_of_two_processes_equal_one(tmp_path: Path) -> None:
    """EMA on shards and replicas: in validations, as modules, in files, applied, resumed with another runtime."""
    process = torchrun("averages.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    for rank in range(2):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(errors) == 10
        assert not {name: error for name, error in errors.items() if not error < 1e-12}


def test_shards_are_shares_of_memory(tmp_path: Path) -> None:
    """Parameters and optimizer state of a process: at most 60 % of those of one."""
    process = torchrun("memory.py", 2, str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()[-3000:]
    results = json.loads((tmp_path / "bytes.json").read_text())
    assert results["sharded"] <= 0.6 * results["whole"]


def resumed_on(tmp_path: Path, stages: list[tuple[int, str]]) -> None:
    """Take four steps with each number of processes and runtime, and compare with all steps in one process."""
    commands = [
        (processes, str(tmp_path / "run"), kind, str(4 * (stage + 1))) for stage, (processes, kind) in enumerate(stages)
    ]
    total = str(4 * len(stages))
    for processes, *arguments in (*commands, (1, str(tmp_path / "whole"), "single", total)):
        process = torchrun("resume.py", processes, *arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()[-3000:]
    process = torchrun("resume.py", 1, str(tmp_path), "compare", total)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output.decode()[-3000:]


def test_resume_on_fewer_processes(tmp_path: Path) -> None:
    """Four steps with 2 processes, sharded, four with 2, replicated, four with 1: as twelve with one."""
    resumed_on(tmp_path, [(2, "sharded"), (2, "data"), (1, "single")])


@pytest.mark.slow
def test_resume_on_four_two_three_and_one_processes(tmp_path: Path) -> None:
    resumed_on(tmp_path, [(4, "sharded"), (2, "data"), (3, "sharded"), (1, "single")])


def test_one_process_loads_no_distribution() -> None:
    """The plain path imports nothing of the runtimes of several processes."""
    code = (
        "import sys, torch, nestor\n"
        "theta = nestor.Variable(torch.ones(2))\n"
        "p = nestor.Program(theta=nestor.Problem(theta, lambda theta: theta().square().sum(),"
        " optimizer=torch.optim.SGD(theta.parameters(), lr=0.1)))\n"
        "nestor.Engine(p).run(2)\n"
        "print([m for m in sys.modules if m.startswith('nestor.distributed.')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['nestor.distributed.runtime']"


def test_without_torchrun_the_error_says_how() -> None:
    """Not a hang."""
    out = subprocess.run(
        [sys.executable, "-c", "import nestor; nestor.DataParallel()"], capture_output=True, text=True, check=False
    )
    assert "torchrun --standalone --nproc-per-node 2" in out.stderr
