"""Callbacks of a run that was killed and resumed: as if nothing had happened."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nestor
from nestor.callbacks import BestWeights, Callback, Checkpoint, CSVLog, EarlyStopping

Make = Callable[..., nestor.Engine]

# Best at 4, and no better at 5 to 8: a patience of 4 ends the run at 8.
SCORES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0}


class Killed(Callback):
    """Ends a run at a step, after the other callbacks have seen it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, engine: nestor.Engine) -> None:
        if engine.step == self.at:
            raise KeyboardInterrupt


class Run:
    """One process's engine, with everything that it keeps."""

    def __init__(self, make: Make, folder: Path, *, kill: int = 0) -> None:
        self.stopping = EarlyStopping("score", patience=4)
        self.best = BestWeights("score")
        self.path = folder / "metrics.csv"
        saver = Checkpoint(folder / "checkpoints", every=3)
        callbacks = [self.stopping, self.best, CSVLog(self.path), saver, Killed(kill)]
        self.engine = make(callbacks=callbacks, validate=self.validate, validate_every=1)

    def validate(self) -> dict[str, float]:
        return {"score": SCORES[self.engine.step]}

    def table(self) -> list[dict[str, str]]:
        """The rows without their times."""
        with self.path.open(newline="") as file:
            return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]

    def kept(self) -> Any:
        return self.best.state_dict()["kept"]


@pytest.mark.parametrize("kill", [2, 4, 5, 7])
def test_killed_and_resumed_is_uninterrupted(kill: int, make: Make, tmp_path: Path) -> None:
    """Rows, the best value and its weights, and the step at which it ends; resumed again it is over."""
    whole = Run(make, tmp_path / "whole")
    whole.engine.run(100)
    assert (whole.engine.step, whole.best.best_step) == (8, 4)
    with pytest.raises(KeyboardInterrupt):
        Run(make, tmp_path / "killed", kill=kill).engine.run(100)
    with (tmp_path / "killed" / "metrics.csv").open("a") as file:
        file.write("9,0.")  # a row cut short
    resumed = Run(make, tmp_path / "killed")
    resumed.engine.run(100, resume="latest")
    assert resumed.engine.step == resumed.stopping.stopped_at == 8
    assert (resumed.best.best, resumed.best.best_step) == (1.0, 4)
    assert resumed.table() == whole.table()
    for name, state in whole.kept()["modules"].items():
        for key, value in state.items():
            assert torch.equal(resumed.kept()["modules"][name][key], value)
    over = Run(make, tmp_path / "killed")
    over.engine.run(100, resume="latest")
    assert over.engine.step == 8
    assert over.table() == whole.table()
