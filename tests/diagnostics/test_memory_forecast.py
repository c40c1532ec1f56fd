"""explain(batches) foresees the memory of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from nestor.explain.peak_memory import PeakMemory

RESPONSES: dict[str, nestor.Response] = {
    "T1T2": nestor.T1T2(),
    "FiniteDifference": nestor.FiniteDifference(),
    "reused": nestor.FiniteDifference(reuse=True),
    "SAMA": nestor.SAMA(),
    "ConjugateGradient": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3), damping=10.0),
    "Neumann": nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=1e-3)),
    "Unrolled step": nestor.Unrolled(),
    "Unrolled step, states": nestor.Unrolled(keep_graphs=False),
    "Unrolled none": nestor.Unrolled(checkpoint="none"),
    "Unrolled sqrt": nestor.Unrolled(checkpoint="sqrt"),
}


def build(response: nestor.Response, lower: Any = SGD, unroll: int = 1) -> tuple[nestor.Program, dict[str, Any]]:
    """Weights of samples, from their losses, for a small convolutional network."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 100, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    weigh = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    x, y = torch.randn(20, 1, 12, 12), torch.randint(0, 5, (20,))

    def fit(batch: Any, net: nn.Module, weigh: nn.Module) -> Tensor:
        losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
        return (weigh(losses.detach()[:, None]).squeeze(1) * losses).mean()

    def judge(batch: Any, net: nn.Module) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    options = {"momentum": 0.9} if lower is SGD else {}
    program = nestor.Program(
        net=nestor.Problem(
            net,
            fit,
            data=[(x, y)],
            optimizer=lower(net.parameters(), lr=1e-3, **options),
            response=response,
            unroll_steps=unroll,
        ),
        weigh=nestor.Problem(weigh, judge, data=[(x, y)], optimizer=Adam(weigh.parameters(), lr=1e-3)),
    )
    return program, {"net": (x, y), "weigh": (x, y)}


def held_by(program: nestor.Program) -> int:
    """Bytes of the parameters and of what the optimizers keep, which are there before a run is measured."""
    tensors: list[Tensor] = []
    for level in program.levels.values():
        tensors += level.parameters
        assert level.problem.optimizer is not None
        for slot in level.problem.optimizer.state.values():
            tensors += [value for value in slot.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("lower", [SGD, Adam])
@pytest.mark.parametrize("case", RESPONSES)
def test_peak_is_foreseen(case: str, lower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 15 % of the bytes of all tensors that live at the peak of a run."""
    monkeypatch.setattr("nestor.vectors.algebra.LARGE", 0)
    unroll = 9 if case.startswith("Unrolled") else 1
    program, batches = build(RESPONSES[case], lower, unroll)
    foreseen = program.explain(batches).memory
    assert foreseen is not None
    # The first step of a run also compares differences with exact derivatives, which is not part of a step.
    engine = nestor.Engine(program, seed=0, check=False)
    engine.run(2 * unroll)
    with PeakMemory() as memory:
        engine.run(2 * unroll)
    assert foreseen.peak == pytest.approx(memory.peak + held_by(program), rel=0.15)
    # Looked at in the middle of a run, it says the same.
    again = program.explain(batches).memory
    assert again is not None
    assert again.peak == pytest.approx(foreseen.peak, rel=0.05)


def test_nothing_changes() -> None:
    """No parameter, optimizer state or random generator."""
    program, batches = build(nestor.T1T2())
    before = [p.detach().clone() for level in program.levels.values() for p in level.parameters]
    generator = torch.get_rng_state()
    text = str(program.explain(batches))
    assert "MiB are held at the peak" in text
    assert torch.equal(torch.get_rng_state(), generator)
    after = [p for level in program.levels.values() for p in level.parameters]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(not level.problem.optimizer.state for level in program.levels.values() if level.problem.optimizer)
    nestor.Engine(program, seed=0).run(2)


def test_what_cannot_be_foreseen() -> None:
    """A batch that is missing, and a loss that looks at numbers."""
    program, batches = build(nestor.T1T2())
    with pytest.raises(ValueError, match="needs a batch of level 'weigh' too"):
        program.explain({"net": batches["net"]})
    v = nestor.Variable(torch.ones(2))
    looks = nestor.Program(v=nestor.Problem(v, lambda v: (v() ** 2).sum() * max(v().sum().item(), 1.0)))
    with pytest.raises(nestor.NestorError, match="reads a value"):
        looks.explain({})
