"""Activation checkpointing: a model that reads its parameters again in the backward pass gets the same numbers."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nestor

CG = nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=5, rtol=0.0), damping=40.0)
RESPONSES: dict[str, Callable[[], nestor.Response]] = {
    "t1t2": nestor.T1T2,
    "forward": lambda: nestor.T1T2(cross=nestor.ForwardMode()),
    "difference": nestor.FiniteDifference,
    "reused": lambda: nestor.FiniteDifference(reuse=True),
    "sama": nestor.SAMA,
    "cg": lambda: CG,
    "neumann": lambda: nestor.Implicit(solver=nestor.Neumann(num_terms=4, step_size=0.1)),
    "fixed_point": lambda: nestor.Implicit(solver=nestor.GMRES(max_steps=5), condition=nestor.FixedPoint()),
    "gauss_newton_free": lambda: nestor.Implicit(
        solver=nestor.MINRES(max_steps=5), condition=nestor.Stationarity(curvature=nestor.FiniteDifferenceHessian())
    ),
    "unrolled_step": nestor.Unrolled,
    "unrolled_sqrt": lambda: nestor.Unrolled(checkpoint="sqrt"),
    "unrolled_tree": lambda: nestor.Unrolled(checkpoint="tree"),
    "unrolled_none": lambda: nestor.Unrolled(checkpoint="none"),
    "forward_unrolled": nestor.ForwardUnrolled,
    "evolution": lambda: nestor.EvolutionStrategies(samples=2, sigma=0.1),
}


class Net(nn.Module):
    """A block that is computed again in the backward pass if ``checkpointed``."""

    def __init__(self, checkpointed: bool, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.dropout = nn.Dropout(dropout)
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.dropout(torch.tanh(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.last(hidden)


def run(response: nestor.Response, *, checkpointed: bool, dropout: float = 0.0) -> list[Tensor]:
    """Learn the inputs' shift for some upper steps; return all variables."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x, y, xv, yv = (torch.randn(8, n, dtype=torch.float64, generator=generator) for n in (5, 1, 5, 1))
    net = Net(checkpointed, dropout=dropout).double()
    shift = nestor.Variable(torch.zeros(5, dtype=torch.float64))

    def lower(net: nn.Module, shift: nn.Module) -> Tensor:
        return (net(x + shift()) - y).square().mean()

    def upper(net: nn.Module) -> Tensor:
        return F.mse_loss(net(xv), yv)

    program = nestor.Program(
        net=nestor.Problem(
            net, lower, response=response, unroll_steps=3, optimizer=torch.optim.SGD(net.parameters(), 0.2, 0.5)
        ),
        shift=nestor.Problem(shift, upper, optimizer=torch.optim.SGD(shift.parameters(), lr=1.0)),
    )
    nestor.Engine(program, seed=0).run(6)
    return [p.detach() for p in (*net.parameters(), *shift.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", RESPONSES)
def test_checkpointing_changes_no_bit(name: str, dropout: float) -> None:
    plain = run(RESPONSES[name](), checkpointed=False, dropout=dropout)
    assert all(map(torch.equal, plain, run(RESPONSES[name](), checkpointed=True, dropout=dropout)))


def test_all_checkpoints_of_unrolled_give_the_same_bits() -> None:
    runs = [run(RESPONSES[f"unrolled_{kind}"](), checkpointed=True) for kind in ("step", "sqrt", "tree", "none")]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("nesting", ["exact", "frozen"])
@pytest.mark.parametrize("name", ["t1t2", "difference", "cg", "unrolled_step"])
def test_three_levels(name: str, nesting: str) -> None:
    """A middle level whose objective contains the response of a checkpointed one."""

    def gradient(checkpointed: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(8, 5, dtype=torch.float64, generator=generator), torch.ones(8, 1, dtype=torch.float64)
        net = Net(checkpointed).double()
        shift, top = (nestor.Variable(torch.full((5,), v, dtype=torch.float64)) for v in (0.1, 0.2))

        def low(net: nn.Module, shift: nn.Module) -> Tensor:
            return (net(x + shift()) - y).square().mean()

        def middle(shift: nn.Module, net: nn.Module, top: nn.Module) -> Tensor:
            return (net(x) - 0.5 * y).square().mean() + ((shift() - top()) ** 2).sum()

        def high(top: nn.Module, shift: nn.Module, net: nn.Module) -> Tensor:
            return F.mse_loss(net(-x), y) + (shift() ** 2).sum() + (top() ** 2).sum()

        program = nestor.Program(
            nesting=nesting,
            net=nestor.Problem(
                net, low, response=RESPONSES[name](), unroll_steps=2, optimizer=torch.optim.SGD(net.parameters(), 0.1)
            ),
            shift=nestor.Problem(
                shift,
                middle,
                response=RESPONSES[name](),
                unroll_steps=2,
                optimizer=torch.optim.SGD(shift.parameters(), 0.1),
            ),
            top=nestor.Problem(top, high),
        )
        value = program.objective("top")
        (backward,) = torch.autograd.grad(value, list(top.parameters()))
        return program.hypergradient("top")["value"], backward

    for one, other in zip(gradient(True), gradient(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["t1t2", "cg", "unrolled_step", "sama", "difference"])
def test_hugging_face_bert(name: str) -> None:
    """Hugging Face's own switch, default attention, dropout on."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )

    def weights(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = transformers.BertForSequenceClassification(config).double().train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers 5 gives it another name
                net.gradient_checkpointing_enable()
        ids = torch.randint(40, (6, 7), generator=torch.Generator().manual_seed(2))
        labels = torch.arange(6) % 3
        logits = nestor.Variable(torch.zeros(6, dtype=torch.float64))

        def lower(net: nn.Module, logits: nn.Module) -> Tensor:
            losses = F.cross_entropy(net(input_ids=ids).logits, labels, reduction="none")
            return (torch.sigmoid(logits()) * losses).mean()

        def upper(net: nn.Module) -> Tensor:
            return F.cross_entropy(net(input_ids=ids.flip(0)).logits, labels)

        program = nestor.Program(
            net=nestor.Problem(
                net, lower, response=RESPONSES[name](), unroll_steps=2, optimizer=torch.optim.AdamW(net.parameters())
            ),
            logits=nestor.Problem(logits, upper, optimizer=torch.optim.SGD(logits.parameters(), lr=1.0)),
        )
        nestor.Engine(program, seed=0).run(4)
        return [p.detach() for p in (*net.parameters(), *logits.parameters())]

    for one, other in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
