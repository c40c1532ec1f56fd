"""Wrappers that are optimizers by name alone are refused, with the optimizer inside."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

import nestor


class Wrapper(Optimizer):
    """As accelerate's: it never calls the constructor of torch."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.base.param_groups


class Forgetful(Optimizer):
    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params)}]


def problem(optimizer: Optimizer) -> nestor.Problem:
    return nestor.Problem(nestor.Variable(torch.ones(1)), lambda net: net().sum(), optimizer=optimizer)


def test_the_optimizer_inside_is_named() -> None:
    base = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match=r"Wrapper is no whole .*attribute 'base': pass that one, optimizer.base"):
        problem(Wrapper(base))
    with pytest.raises(TypeError, match=r"Forgetful is no whole .*Call super\(\).__init__"):
        problem(Forgetful([torch.nn.Parameter(torch.ones(1))]))


def test_copies_and_stepped_optimizers_are_whole() -> None:
    net = nestor.Variable(torch.ones(1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net().sum().backward()
    optimizer.step()
    for whole in (optimizer, copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        problem(whole)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nestor.Variable(torch.ones(1))
    prepared = accelerate.Accelerator(cpu=True).prepare(SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer is no whole .*optimizer\.optimizer"):
        problem(prepared)
    nestor.Engine(nestor.Program(net=nestor.Problem(net, lambda net: net().sum(), optimizer=prepared.optimizer))).run(1)
    assert net().item() == pytest.approx(0.9)
