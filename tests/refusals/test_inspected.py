"""What the first evaluation of a loss shows: a graph that hides parameters, second derivatives, changes in place."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import nestor
from nestor import (
    Implicit,
    NotAFunctionError,
    Problem,
    Program,
    Response,
    UnsupportedError,
    Variable,
)
from nestor.autodiff.instruments import counting

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

Model = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A layer, a block that is evaluated in a special way, and a layer."""

    def __init__(self, special: Callable[[nn.Module, Tensor], Tensor], *, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Identity() if first else nn.Linear(3, 3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.after = nn.Linear(3, 1)
        self.special = special
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        if not hidden.requires_grad:
            hidden = hidden.clone().requires_grad_()
        return self.after(self.special(self.block, hidden))


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def again(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


class Recomputed(Function):
    """A user's own checkpointing: the block's parameters are hidden from autograd."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.block(x).backward(g)
        return None, x.grad


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    return Recomputed.apply(block, x)


def fit(net: nn.Module, w: Variable) -> Tensor:
    return (torch.sigmoid(w()) * net(X).square().squeeze(1)).mean()


def judge(net: nn.Module) -> Tensor:
    return net(X.flip(1)).square().mean()


def bilevel(net: nn.Module, response: Response | None = None, loss: Any = fit, **options: Any) -> Program:
    w = Variable(torch.zeros(4, dtype=torch.float64))
    return Program(
        net=Problem(net, loss, response=response, optimizer=SGD(net.parameters(), lr=0.1), **options),
        w=Problem(w, judge, optimizer=SGD(w.parameters(), lr=0.1)),
    )


def by_hand(program: Program) -> None:
    program.hypergradient("w")


def in_a_run(program: Program) -> None:
    nestor.Engine(program, seed=0).run(1)


def compiled(program: Program) -> None:
    nestor.Engine(program, seed=0, compile=True).run(1)


RUNS = [by_hand, in_a_run, compiled]
RESPONSES = [nestor.T1T2(), nestor.FiniteDifference(), nestor.Unrolled(), Implicit(damping=1.0), nestor.FirstOrder()]


@pytest.mark.parametrize("first", [True, False], ids=["first", "inside"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("special", "patterns"),
    [(reentrant, ["use_reentrant=True", "use_reentrant=False"]), (recomputed, ["Recomputed", "as arguments"])],
)
def test_hidden_parameters(special: Any, patterns: list[str], run: Callable[[Program], None], first: bool) -> None:
    """Refused whether or not autograd reaches the block; no parameter and no ``.grad`` changes."""
    net = Net(special, first=first)
    net.block[0].weight.grad = torch.ones(3, 3, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedError, match=r"level '(net|w)', loss (fit|judge) \(.*py:\d+\)") as caught:
        run(bilevel(net))
    assert all(pattern in str(caught.value) for pattern in patterns)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert net.block[0].weight.grad.eq(1).all()
    assert net.block[0].bias.grad is None


@pytest.mark.parametrize("response", RESPONSES[:-1], ids=lambda r: r.describe())
def test_the_other_checkpointing_is_right(response: Response) -> None:
    """What the error recommends: the same hypergradient as without checkpointing."""
    found = [bilevel(Net(special), response).hypergradient("w")["value"] for special in (again, plain)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-15)


def test_a_global_backward_hook_is_seen_in_the_graph() -> None:
    """A hook of all modules is registered in torch, not in a module."""
    hook = nn.modules.module.register_module_full_backward_hook(lambda module, inputs, outputs: None)
    try:
        with pytest.raises(UnsupportedError, match="a backward hook"):
            bilevel(Net(plain)).hypergradient("w")
    finally:
        hook.remove()


# Changes in place


def clamp(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.clamp_(-0.1, 0.1)


def clamp_data(parameter: Tensor) -> None:
    parameter.data.clamp_(-0.1, 0.1)


def clamp_as_numpy(parameter: Tensor) -> None:
    array = parameter.detach().numpy()
    np.clip(array, -0.1, 0.1, out=array)


@pytest.mark.parametrize("where", ["model", "loss", "upper loss"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("change", [clamp, clamp_data, clamp_as_numpy])
def test_changes_in_place(change: Callable[[Tensor], None], run: Callable[[Program], None], where: str) -> None:
    """Found by values: a change of ``.data`` leaves no version. The parameters are as before, bit for bit."""

    def special(block: Any, x: Tensor) -> Tensor:
        if where == "model":
            change(block[0].weight)
        return block(x)

    def loss(net: Any, w: Variable) -> Tensor:
        if where == "loss":
            change(net.block[0].weight)
        return fit(net, w)

    def upper(net: Any) -> Tensor:
        if where == "upper loss":
            change(net.block[0].weight)
        return judge(net)

    net = Net(special)
    before = copy.deepcopy(net.state_dict())
    w = Variable(torch.zeros(4, dtype=torch.float64))
    program = Program(
        net=Problem(net, loss, optimizer=SGD(net.parameters(), lr=0.0)),
        w=Problem(w, upper, optimizer=SGD(w.parameters(), lr=0.1)),
    )
    with pytest.raises(NotAFunctionError, match=r"changes variables in place \(net\.block\.0\.weight\)") as caught:
        run(program)
    assert caught.value.level == ("w" if where == "upper loss" or (where == "model" and run is by_hand) else "net")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "response", [nestor.Unrolled(), nestor.Unrolled(checkpoint="none")], ids=lambda r: r.describe()
)
def test_changes_in_place_of_copies(response: Response) -> None:
    """Steps whose graphs are kept are taken at copies, which are what the loss changes."""

    def loss(t: Any, w: Variable) -> Tensor:
        t.value.data.clamp_(-0.1, 0.1)
        return (t() - w()).square().sum()

    t, w = (Variable(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    program = Program(
        t=Problem(t, loss, response=response, optimizer=SGD(t.parameters(), lr=0.1)),
        w=Problem(w, lambda t: t().sum(), optimizer=SGD(w.parameters(), lr=1.0)),
    )
    with pytest.raises(NotAFunctionError, match=r"changes variables in place \(t\.value\)"):
        nestor.Engine(program, seed=0).run(1)
    assert torch.equal(t().detach(), torch.ones(2, dtype=torch.float64))


class Norms(nn.Module):
    """Buffers and constants may change: statistics, and a frozen parameter that is an average of another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.teacher = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.lerp_(self.norm.weight, 0.5)
        return self.linear(self.norm(x)).sum(1, keepdim=True)


@pytest.mark.parametrize("response", [nestor.T1T2(), nestor.FiniteDifference()], ids=lambda r: r.describe())
def test_what_may_change(response: Response) -> None:
    """Statistics, power iterations, frozen parameters, and a parameter that is NaN but nobody uses."""
    net = Norms()
    net.unused = nn.Parameter(torch.full((2,), float("nan"), dtype=torch.float64))
    by_hand(bilevel(net, response, variables=[*net.norm.parameters(), net.unused]))
    program = bilevel(net, response, variables=list(net.norm.parameters()))
    nestor.Engine(program, seed=0).run(2)


# Costs


def test_evaluations_are_those_of_the_formula() -> None:
    """The first hypergradient costs as many evaluations as the next."""
    program = bilevel(Net(plain))
    with counting() as first:
        program.hypergradient("w")
    with counting() as second:
        program.hypergradient("w")
    assert (first.forwards, first.gradients, first.hvps) == (second.forwards, second.gradients, second.hvps)


def test_nothing_is_left_of_an_inspection() -> None:
    """After the first evaluation the reader calls the loss itself; an engine inspects again, once."""
    program = bilevel(Net(plain))
    readers = [level.loss.reader for level in program.levels.values()]
    for run in (by_hand, in_a_run):
        run(program)
        assert [reader.function for reader in readers] == [(fit,), (judge,)]
    engine = nestor.Engine(program, seed=0)
    engine.run(1)
    engine.run(1)
    assert [reader.function for reader in readers] == [(fit,), (judge,)]


class Words(nn.Module):
    """Embedded words and a decoder; ``masked`` multiplies the embeddings of padding by zero."""

    def __init__(self, *, tied: bool, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.masked = nn.Embedding(5, 3, padding_idx=0).double(), masked
        self.decoder = nn.Linear(3, 5, bias=False).double()
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        found = self.embedding(words)
        found = found * (words != 0).unsqueeze(-1) if self.masked else found
        return self.decoder(torch.tanh(found.mean(1)))


PADDED, FULL = torch.tensor([[1, 2, 0, 0], [3, 4, 1, 0], [2, 0, 0, 0]]), torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2]])


def run_words(net: Words, batches: list[Tensor], steps: int) -> Tensor:
    """Take steps of SGD with a penalty above, and return the hypergradient of the penalty."""
    weight = Variable(torch.tensor(-2.0, dtype=torch.float64))

    def low(words: Tensor, net: nn.Module, weight: nn.Module) -> Tensor:
        decoder = net.get_submodule("decoder")
        return nn.functional.cross_entropy(net(words), words[:, 0]) + weight().exp() * decoder(X[:1]).square().sum()

    def top(net: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(net(PADDED), PADDED[:, 1])

    program = Program(
        net=Problem(
            net, low, data=batches, optimizer=SGD(net.parameters(), 0.3), unroll_steps=steps, response=nestor.Unrolled()
        ),
        weight=Problem(weight, top, optimizer=SGD(weight.parameters(), 0.0)),
    )
    engine = nestor.Engine(program, seed=0)
    engine.run(steps)
    return engine.hypergradient("weight")[0]


def rerun_words(net: Words, batches: list[Tensor], steps: int, weight: float) -> float:
    """Take the same steps in a loop of plain torch, and return the upper loss."""
    sgd = SGD(net.parameters(), 0.3)
    for step in range(steps):
        words = batches[step % len(batches)]
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(words), words[:, 0])
        (loss + np.exp(weight) * net.decoder(X[:1]).square().sum()).backward()
        sgd.step()
    return nn.functional.cross_entropy(net(PADDED), PADDED[:, 1]).item()


@pytest.mark.parametrize("batches", [[PADDED], [FULL, FULL, PADDED]], ids=["at first", "later"])
def test_a_padding_row_that_moves(batches: list[Tensor]) -> None:
    """Tied weights move the row of padding, whose look-ups torch does not differentiate: the run says so, once."""
    with pytest.warns(nestor.NestorWarning, match="row 0 of an embedding with padding_idx=0") as caught:
        found = run_words(Words(tied=True), batches, 4)
    assert len(caught) == 1
    h = 1e-5
    above, below = (rerun_words(Words(tied=True), batches, 4, -2.0 + shift) for shift in (h, -h))
    assert abs(found.item() - (above - below) / (2 * h)) > 0.01 * abs(found.item())


@pytest.mark.parametrize("options", [{"tied": True, "masked": True}, {"tied": False}], ids=["masked", "not tied"])
def test_a_padding_row_that_does_no_harm(options: dict[str, bool]) -> None:
    """Without a warning, and the hypergradient is that of the re-run loop."""
    found = run_words(Words(**options), [FULL, PADDED], 4)
    h = 1e-5
    above, below = (rerun_words(Words(**options), [FULL, PADDED], 4, -2.0 + shift) for shift in (h, -h))
    assert found.item() == pytest.approx((above - below) / (2 * h), rel=1e-6)
