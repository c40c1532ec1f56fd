"""How many files the steps of an engine pass through: someone who follows a step must read them."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestor
from nestor import Problem, Response, Variable

SOURCE = Path(nestor.__file__).parent


def ridge(response: Response) -> nestor.Engine:
    """Build an engine of a linear model with a penalty for each weight; two lower steps for each upper step."""
    batch = torch.randn(64, 5), torch.randn(64, 1)
    net, penalty = nn.Linear(5, 1), Variable(torch.zeros(5))

    def fit(batch: Any, net: nn.Module, penalty: Variable) -> Tensor:
        x, y = batch
        return (net(x) - y).square().mean() + (penalty().exp() * net.weight**2).sum()

    def judge(batch: Any, net: nn.Module) -> Tensor:
        x, y = batch
        return (net(x) - y).square().mean()

    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(penalty.parameters(), lr=0.01)
    program = nestor.Program(
        net=Problem(net, fit, optimizer=sgd, data=[batch], response=response, unroll_steps=2),
        penalty=Problem(penalty, judge, optimizer=adam, data=[batch]),
    )
    return nestor.Engine(program, seed=0)


@pytest.mark.parametrize(("response", "most"), [(nestor.T1T2(), 31), (nestor.Unrolled(), 44)], ids=["T1T2", "Unrolled"])
def test_a_step_passes_through_few_files(response: Response, most: int) -> None:
    engine = ridge(response)
    engine.run(8)
    files = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(SOURCE):
            files.add(frame.f_code.co_filename.removeprefix(str(SOURCE)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        engine.run(2)
    finally:
        sys.setprofile(before)
    assert len(files) <= most, sorted(files)
