"""The table of responses on the user's own program."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.diagnostics import Comparison
from nestor.explain.peak_memory import PeakMemory


def build(dtype: torch.dtype, hidden: int = 8) -> tuple[nestor.Program, dict[str, Any]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)
    weight = nestor.Variable(torch.zeros(12, dtype=dtype))
    x, y = torch.randn(12, 4, dtype=dtype), torch.randint(0, 3, (12,))

    def train(batch: Any, net: Any, weight: Any) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(net(x), y, reduction="none")
        return (torch.sigmoid(weight()) * losses).mean() + 0.1 * sum(p.square().sum() for p in net.parameters())

    program = nestor.Program(
        net=nestor.Problem(net, train, optimizer=torch.optim.SGD(net.parameters(), lr=0.5), unroll_steps=20),
        weight=nestor.Problem(weight, lambda batch, net: F.cross_entropy(net(batch[0]), batch[1])),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(500):
        optimizer.zero_grad()
        train((x, y), net, weight).backward()
        optimizer.step()
    return program, {"net": (x, y), "weight": (x.flip(1), y)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_table(dtype: torch.dtype) -> None:
    """At a minimum: long solves agree with the dense one, cheap ones point the same way, counts are what they cost."""
    program, batches = build(dtype)
    before = [p.detach().clone() for level in program.levels.values() for p in level.parameters]
    table = nestor.check_hypergradient(program, "weight", batches)
    trials = {trial.name: trial for trial in table.trials}
    assert all(not trial.failure for trial in trials.values()), [t.failure for t in table.trials]
    good = trials["Implicit(ConjugateGradient())"]
    assert good.relative_error < 1e-3
    assert good.cosine > 0.999
    assert trials["Unrolled(checkpoint='step')"].relative_error < 0.2
    assert trials["Implicit()"].cosine > 0.3 if "Implicit()" in trials else True
    assert trials["FirstOrder"].scale < good.scale
    assert good.cost is not None
    assert good.cost.forwards["net"] == 1
    assert good.seconds > 0
    assert good.memory is not None
    assert good.memory > 0
    assert table.stationarity["net"] < 1e-2
    text = str(table)
    assert "cosine" in text
    assert "DenseSolve" in text
    after = [p.detach() for level in program.levels.values() for p in level.parameters]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_large_levels_take_a_long_solve() -> None:
    """Above 1,500 variables no matrix is assembled."""
    program, batches = build(torch.float32, hidden=250)
    table = nestor.check_hypergradient(program, "weight", batches, responses=[nestor.T1T2()])
    assert "ConjugateGradient" in table.reference
    assert [trial.name for trial in table.trials] == ["T1T2"]


def test_failures_are_rows() -> None:
    """A response that does not apply says why, and the others are still compared."""
    program, batches = build(torch.float64)
    bad = nestor.Implicit(solver=nestor.Neumann(num_terms=50, step_size=50.0))
    table = nestor.check_hypergradient(program, "weight", batches, responses=[bad, nestor.T1T2()])
    assert "diverges" in table.trials[0].failure
    assert not table.trials[1].failure
    assert isinstance(table, Comparison)
    with pytest.raises(ValueError, match="no level below"):
        nestor.check_hypergradient(program, "net", batches)


def test_three_levels_and_own_reference() -> None:
    """All levels below are given the response; the reference can be chosen."""
    a, b, c = (nestor.Variable(torch.full((2,), v, dtype=torch.float64)) for v in (0.1, 0.2, 0.3))
    program = nestor.Program(
        a=nestor.Problem(a, lambda a, b: ((a() - b()) ** 2).sum()),
        b=nestor.Problem(b, lambda a, b, c: ((b() - c()) ** 2).sum() + 0.1 * (a() ** 2).sum()),
        c=nestor.Problem(c, lambda b: (b() ** 2).sum()),
    )
    exact = nestor.Implicit(solver=nestor.DenseSolve())
    table = nestor.check_hypergradient(program, "c", responses=[exact, nestor.T1T2()], reference=exact)
    assert table.trials[0].relative_error < 1e-12
    assert set(table.stationarity) == {"a", "b"}


def test_peak_memory_counts_what_lives() -> None:
    """Two tensors of a megabyte alive at once, ten one after the other."""
    with PeakMemory() as memory:
        kept = torch.zeros(250_000)
        for _ in range(10):
            kept = kept + 1
    assert memory.peak == 2_000_000
