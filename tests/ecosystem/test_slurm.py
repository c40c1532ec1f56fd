"""The recipe of torchrun and Slurm: its commands, and its job file with stand-ins for the commands of a cluster."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launchers import RECIPES, TORCHRUN, output, write_files

pytestmark = pytest.mark.distributed

SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done     # options of srun
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost ;;
    requeue) echo "$2" >> requeued ;;
esac
"""
LAST = re.compile(r"step (\d+), (\d) processes, weights/loss (\d\.\d{10})")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def cluster(folder: Path) -> dict[str, str]:
    """Write the recipe's files and the stand-ins; return the environment of a job on one node."""
    write_files("slurm", folder)
    (job,) = re.findall(
        r"^```sh\n(#!/bin/bash\n.*?)^```$", (RECIPES / "slurm.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert ":29500" in job
    (folder / "job.sh").write_text(job.replace(":29500", f":{free_port()}"))
    commands = folder / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints of a run."""
    return sorted(int(step.name.removeprefix("step-")) for step in folder.glob("step-*"))


def last(text: str) -> tuple[str, ...]:
    (found,) = LAST.findall(text)
    return tuple(found)


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_of_torchrun_equal_one(tmp_path: Path) -> None:
    """The ten digits that the page prints."""
    write_files("slurm", tmp_path)
    one = output(tmp_path, "train.py", "one", "40")
    two = output(tmp_path, *TORCHRUN, "train.py", "two", "40")
    assert last(one) == ("40", "1", last(two)[2])
    assert last(two)[1] == "2"
    assert one + two in (RECIPES / "slurm.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From the checkpoint of two, one process ends where one process would have ended."""
    write_files("slurm", tmp_path)
    output(tmp_path, *TORCHRUN, "train.py", "two", "100")
    assert checkpoints(tmp_path / "two") == [100]
    resumed = last(output(tmp_path, "train.py", "two", "130"))
    assert resumed == last(output(tmp_path, "train.py", "one", "130"))


@pytest.mark.slow
def test_job_runs_to_its_end(tmp_path: Path) -> None:
    environment = {**cluster(tmp_path), "STEPS": "30"}
    ended = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert last(ended.stdout)[:2] == ("30", "2")
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_job_that_meets_its_limit_goes_on(tmp_path: Path) -> None:
    """SIGTERM to the script: the run saves, the job is queued again, and ends with the numbers of one that was not."""
    environment = {**cluster(tmp_path), "STEPS": "600"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "7"
    limit = time.monotonic() + 120
    while not list(folder.glob("step-*")) and time.monotonic() < limit:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=120)
    assert not LAST.findall(printed), "the run was over before the signal came"
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert 0 < checkpoints(folder)[-1] < 600

    ended = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole = output(tmp_path, "train.py", "whole", "600")
    assert last(ended.stdout)[0] == "600"
    assert last(ended.stdout)[2] == last(whole)[2]
