"""A response evaluates the lower loss at other points than the module's own: the loss must not notice."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import nestor
from nestor.explain.peak_memory import PeakMemory
from nestor.responses.implicit.cross import ForwardMode, ReverseMode

F64 = torch.float64
RESPONSES: dict[str, nestor.Response] = {
    "forward": nestor.T1T2(),
    "reverse": nestor.Implicit(solver=nestor.Identity(), cross=ReverseMode()),
    "difference": nestor.FiniteDifference(rel_step=1e-4),
    "reused": nestor.FiniteDifference(rel_step=1e-4, reuse=True),
    "sama": nestor.SAMA(rel_step=1e-4),
    "solve": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=3), damping=1.0),
    "unrolled": nestor.Unrolled(),
    "forward unrolled": nestor.ForwardUnrolled(),
}


def run(
    response: nestor.Response,
    fit: Callable[..., Tensor],
    *,
    make: Callable[[], nn.Module] = lambda: nn.Linear(3, 2),
    steps: int = 3,
    **options: Any,
) -> Tensor:
    """Return the upper variables after some steps."""
    torch.manual_seed(0)
    net, decay = make().double(), nestor.Variable(torch.tensor([0.3, -0.5], dtype=F64))
    x = torch.randn(4, 5, 3, dtype=F64)
    program = nestor.Program(
        net=nestor.Problem(net, fit, data=[x], optimizer=SGD(net.parameters(), lr=0.1), response=response),
        decay=nestor.Problem(
            decay,
            lambda batch, net: (net(batch) - 1).square().mean(),
            data=[x.flip(0)],
            optimizer=Adam(decay.parameters(), lr=0.1),
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nestor.Engine(program, seed=0, **options).run(steps)
    return decay().detach().clone()


def decayed(batch: Tensor, net: nn.Module, decay: nn.Module) -> Tensor:
    penalty = sum(p.square().sum() for p in net.parameters())
    return net(batch).square().mean() + decay().exp().sum() * penalty


def decayed_if_trained(batch: Tensor, net: nn.Module, decay: nn.Module) -> Tensor:
    penalty = sum(p.square().sum() for p in net.parameters() if p.requires_grad)
    return net(batch).square().mean() + decay().exp().sum() * penalty


@pytest.mark.parametrize("case", RESPONSES)
def test_parameters_require_gradients(case: str) -> None:
    """Losses choose by ``requires_grad`` what they decay: a point without it would lose the penalty, silently."""
    assert torch.equal(run(RESPONSES[case], decayed_if_trained), run(RESPONSES[case], decayed))


@pytest.mark.parametrize("case", ["difference", "forward"])
def test_in_a_compiled_graph_too(case: str) -> None:
    """The points of a graph require gradients as well."""
    torch.testing.assert_close(
        run(RESPONSES[case], decayed_if_trained, compile=True), run(RESPONSES[case], decayed), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("case", ["forward", "difference", "reused", "solve"])
def test_a_loss_that_differentiates(case: str) -> None:
    """A gradient penalty inside the loss; forward mode leaves it to reverse mode."""

    def penalised(batch: Tensor, net: nn.Module, decay: nn.Module) -> Tensor:
        value = net(batch).square().mean()
        inner = torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad], create_graph=True)
        return value + decay().exp().sum() * sum(g.square().sum() for g in inner)

    expected = run(RESPONSES["reverse" if case != "solve" else "solve"], penalised)
    tolerance = {"difference": 1e-5, "reused": 0.05}.get(case, 1e-12)
    assert (run(RESPONSES[case], penalised) - expected).norm() <= tolerance


def test_a_loss_without_the_upper_variables() -> None:
    """Nothing to differentiate in: zero, by the one evaluation of forward mode, which the checks of a run refuse."""
    cross = nestor.Implicit(solver=nestor.Identity(), cross=ForwardMode())
    start = torch.tensor([0.3, -0.5], dtype=F64)

    def fit(batch: Tensor, net: nn.Module, decay: nn.Module) -> Tensor:
        return net(batch).square().mean()

    assert torch.equal(run(cross, fit, check=False), start)
    with pytest.raises(nestor.LossError, match="zero by structure"):
        run(cross, fit)


class Attention(nn.Module):
    """Self-attention on batches that are not contiguous, after a transpose, and a product with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.out(self.attention(x, x, x, need_weights=False)[0].transpose(0, 1))


def test_forward_mode_through_attention() -> None:
    """Products in one piece give the numbers of reverse mode."""
    forward = run(nestor.Implicit(solver=nestor.Identity(), cross=ForwardMode()), decayed, make=Attention)
    reverse = run(RESPONSES["reverse"], decayed, make=Attention)
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-12)


class Reading(nestor.callbacks.Callback):
    """Asks for the histories, so that nothing is overwritten or freed."""

    def on_start(self, engine: nestor.Engine) -> None:
        engine.keep_histories()


@pytest.mark.parametrize(
    "response",
    [
        *(RESPONSES[name] for name in ("difference", "reused", "sama")),
        nestor.Implicit(
            solver=nestor.ConjugateGradient(max_steps=2),
            cross=nestor.FiniteDifference(rel_step=1e-4).cross,
            damping=1.0,
            warm_start=True,
        ),
    ],
    ids=["difference", "reused", "sama", "warm start"],
)
def test_a_vector_that_is_used_up(response: nestor.Response, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of a run that keeps it, bit for bit; so are those that start from the last solution."""
    monkeypatch.setattr("nestor.vectors.algebra.LARGE", 0)
    assert torch.equal(run(response, decayed, steps=5), run(response, decayed, steps=5, callbacks=[Reading()]))


def test_memory_of_a_difference() -> None:
    """Beside gradient and parameters: one vector, in which both sides are formed."""
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    decay = nestor.Variable(torch.tensor(-3.0))
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    x = torch.ones(1, 64)
    program = nestor.Program(
        net=nestor.Problem(
            net,
            lambda net, decay: F.softplus(net(x)).mean() + decay() * net(x).mean(),
            optimizer=SGD(net.parameters(), lr=0.1),
            response=nestor.FiniteDifference(),
        ),
        decay=nestor.Problem(decay, lambda net: net(x).square().mean(), optimizer=SGD(decay.parameters(), lr=0.1)),
    )
    engine = nestor.Engine(program, seed=0)
    engine.run(1)
    with PeakMemory() as memory:
        engine.run(1)
    assert memory.peak < 1.15 * size
