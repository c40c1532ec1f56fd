"""`resume.py FOLDER KIND STEPS`: start a run or resume it, up to STEPS; a checkpoint is saved at the end."""

import sys
from pathlib import Path

import torch
from ending import finish
from equivalence import bilevel

import nestor
from nestor.callbacks import Checkpoint


def main(folder: Path, kind: str, steps: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if kind == "compare":
        one, two = (nestor.load_checkpoint(folder / name) for name in ("run", "whole"))
        assert one["step"] == two["step"] == steps
        for a, b in zip(one["modules"].values(), two["modules"].values(), strict=True):
            for name in a["parameters"]:
                torch.testing.assert_close(a["parameters"][name], b["parameters"][name], rtol=1e-10, atol=1e-12)
        return
    runtime = {"sharded": nestor.FullySharded, "data": nestor.DataParallel, "single": nestor.SingleDevice}[kind]()
    response = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3, rtol=1e-12), warm_start=True)
    program = bilevel(response, rows=12)  # shares of 1, 2, 3 and 4 processes are even
    saver = Checkpoint(folder, every=4)
    engine = nestor.Engine(program, runtime=runtime, seed=3, callbacks=[saver])
    engine.run(steps, resume="latest")


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
finish()
