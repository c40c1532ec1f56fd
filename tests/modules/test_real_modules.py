"""What real programs are made of: shared, tied, frozen, parametrized and nested modules, against double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import nestor
from nestor.autodiff.weight_norm import ElementaryWeightNorm

ByHand = Callable[..., dict[str, Tensor]]
Error = Callable[[dict[str, Tensor], dict[str, Tensor]], float]
Bits = Callable[[Any], Any]
Batch = tuple[Tensor, Tensor]
Loss = Callable[..., Tensor]

DAMPING = 50.0
RESPONSES = {
    "t1t2": nestor.T1T2(),
    "forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "cg": nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=300, rtol=1e-13), damping=DAMPING),
}
# Rounding of a double backward; a damped solve magnifies it by the condition number, here below 10.
TOLERANCE = 1e-11

Check = Callable[..., dict[str, Tensor]]
Untouched = Callable[[nestor.Program], AbstractContextManager[None]]


@pytest.fixture(params=RESPONSES)
def check(request: pytest.FixtureRequest, by_hand: ByHand, relative_error: Error, untouched: Untouched) -> Check:
    """Compare the hypergradient of a bilevel program with the derivative by hand, and return it; it leaves no trace."""

    def compare(
        net: nn.Module,
        weights: nn.Module,
        train_loss: Loss,
        valid_loss: Loss,
        train: Any,
        valid: Any,
        *,
        lower: str = "net",
        upper: str = "weights",
        lower_names: Sequence[str] | None = None,
        upper_names: Sequence[str] | None = None,
        lower_options: dict[str, Any] | None = None,
        upper_options: dict[str, Any] | None = None,
        oracle: tuple[Loss, Loss] | None = None,
    ) -> dict[str, Tensor]:
        program = nestor.Program(
            **{
                lower: nestor.Problem(net, train_loss, response=RESPONSES[request.param], **(lower_options or {})),
                upper: nestor.Problem(weights, valid_loss, **(upper_options or {})),
            }
        )
        wanted = by_hand(
            {lower: net, upper: weights},
            *(oracle or (train_loss, valid_loss)),
            train,
            valid,
            lower=lower,
            upper=upper,
            lower_names=lower_names,
            upper_names=upper_names,
            damping=DAMPING if request.param == "cg" else None,
            seed=21,
        )
        torch.manual_seed(21)
        with untouched(program):
            got = program.hypergradient(upper, {lower: train, upper: valid})
        assert relative_error(got, wanted) < TOLERANCE
        return got

    return compare


def data(size: int = 8, inputs: int = 5, classes: int = 3) -> Batch:
    return torch.randn(size, inputs, dtype=torch.float64), torch.randint(0, classes, (size,))


def mlp(inputs: int = 5, hidden: int = 6, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def per_example(size: int = 8) -> nestor.Variable:
    return nestor.Variable(torch.linspace(-1, 1, size, dtype=torch.float64))


def train_loss(batch: Batch, net: nn.Module, weights: nestor.Variable) -> Tensor:
    x, y = batch
    return (weights().exp() * F.cross_entropy(net(x), y, reduction="none")).mean()


def valid_loss(batch: Batch, net: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y)


def decayed(net: nn.Module, weights: nestor.Variable) -> Tensor:
    """Weight decay whose strength is the first of the upper variables."""
    penalty = torch.stack([p.square().sum() for p in net.parameters() if p.requires_grad]).sum()
    return weights().reshape(-1)[0].exp() * penalty


# Supernet


class Supernet(nn.Module):
    """A mixture of operations: weights of the operations and logits of the mixture in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.randn(2, 2).double())
        self.operations = nn.ModuleList([nn.Linear(5, 5).double() for _ in range(2)])
        self.head = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        """Mix the operations in each of two cells."""
        for logits in self.alphas:
            mix = logits.softmax(0)
            x = mix[0] * torch.tanh(self.operations[0](x)) + mix[1] * torch.sigmoid(self.operations[1](x))
        out: Tensor = self.head(x)
        return out

    def weights(self) -> list[nn.Parameter]:
        """All parameters but the mixture's."""
        return [*self.operations.parameters(), *self.head.parameters()]


def by_weights(batch: Batch, weights: Supernet) -> Tensor:
    return F.cross_entropy(weights(batch[0]), batch[1])


def by_architecture(batch: Batch, architecture: Supernet) -> Tensor:
    return F.cross_entropy(architecture(batch[0]), batch[1])


def by_both(batch: Batch, weights: Supernet, architecture: Supernet) -> Tensor:
    # One module under two names: half of the loss is computed by each.
    x, y = batch
    return (F.cross_entropy(weights(x), y) + F.cross_entropy(architecture(x), y)) / 2


@pytest.mark.parametrize("upper", [by_weights, by_architecture, by_both])
@pytest.mark.parametrize("lower", [by_weights, by_architecture, by_both])
@pytest.mark.parametrize("by_optimizer", [False, True])
def test_supernet(lower: Loss, upper: Loss, by_optimizer: bool, check: Check) -> None:
    """Weights and architecture in one module: a loss that reads either name reads both levels."""
    net = Supernet()
    names = [n for n, _ in net.named_parameters() if n != "alphas"]
    if by_optimizer:
        options = [{"optimizer": torch.optim.SGD(group, lr=0.1)} for group in (net.weights(), [net.alphas])]
    else:
        options = [{"variables": group} for group in (net.weights(), [net.alphas])]
    got = check(
        net,
        net,
        lower,
        upper,
        data(),
        data(),
        lower="weights",
        upper="architecture",
        lower_names=names,
        upper_names=["alphas"],
        lower_options=options[0],
        upper_options=options[1],
    )
    assert list(got) == ["alphas"]


def test_supernet_reads_both_levels() -> None:
    """The graph is the same whichever of the names a loss reads."""
    net = Supernet()
    for lower in (by_weights, by_architecture, by_both):
        for upper in (by_weights, by_architecture, by_both):
            program = nestor.Program(
                weights=nestor.Problem(net, lower, variables=net.weights()),
                architecture=nestor.Problem(net, upper, variables=[net.alphas]),
            )
            assert program.uppers("weights") == ("architecture",)
            assert program.lowers("architecture") == ("weights",)


def test_supernet_in_an_engine() -> None:
    """Every level moves its own variables, the upper one along its hypergradient."""
    net, batch, other = Supernet(), data(), data()
    alphas = net.alphas.detach().clone()
    program = nestor.Program(
        weights=nestor.Problem(
            net, by_weights, optimizer=torch.optim.SGD(net.weights(), lr=0.1), data=[batch], unroll_steps=2
        ),
        architecture=nestor.Problem(
            net, by_architecture, optimizer=torch.optim.SGD([net.alphas], lr=1.0), data=[other]
        ),
    )
    engine = nestor.Engine(program, seed=0)
    engine.run(1)
    assert torch.equal(net.alphas, alphas)
    engine.run(1)
    step = alphas - net.alphas.detach()
    with torch.no_grad():
        net.alphas.copy_(alphas)
    wanted = program.hypergradient("architecture", {"weights": batch, "architecture": other})["alphas"]
    torch.testing.assert_close(step, wanted, rtol=1e-10, atol=1e-15)


# Tied, parametrized, frozen, unused and scalar parameters


class Tied(nn.Module):
    """A language model whose decoder is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next token from the mean of the embeddings."""
        out: Tensor = self.decoder(torch.tanh(self.mix(self.embedding(tokens).mean(1))))
        return out


def tokens() -> Batch:
    return torch.randint(0, 6, (8, 5)), torch.randint(0, 6, (8,))


def test_tied_weights_below(check: Check) -> None:
    """Both uses of the tied tensor answer to the upper level."""
    check(Tied(), per_example(), train_loss, valid_loss, tokens(), tokens())


def test_tied_weights_above(check: Check) -> None:
    """The hypergradient of a tied tensor is the sum over its uses, under its first name."""

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        return F.cross_entropy(weights(batch[0]) @ net.weight, batch[1])  # type: ignore[operator]

    def valid(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        return F.cross_entropy(weights(batch[0]) @ net.weight, batch[1])  # type: ignore[operator]

    got = check(nn.Linear(6, 6).double(), Tied(), train, valid, tokens(), tokens())
    assert list(got) == ["embedding.weight", "mix.weight", "mix.bias"]


def test_tied_weights_stay_tied_in_an_engine() -> None:
    """One tensor, one step."""
    net, weights, batch = Tied(), per_example(), tokens()
    gradient = torch.autograd.grad(train_loss(batch, net, weights), net.embedding.weight)[0]
    wanted = net.embedding.weight.detach() - 0.1 * gradient
    program = nestor.Program(
        net=nestor.Problem(net, train_loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=[batch]),
        weights=nestor.Problem(
            weights, valid_loss, optimizer=torch.optim.SGD(weights.parameters(), lr=1.0), data=[tokens()]
        ),
    )
    nestor.Engine(program, seed=0).run(1)
    assert net.decoder.weight is net.embedding.weight
    torch.testing.assert_close(net.embedding.weight.detach(), wanted, rtol=1e-14, atol=1e-15)


class Positive(nn.Module):
    """A parametrization: the exponential of what is stored."""

    def forward(self, raw: Tensor) -> Tensor:
        """Map what is stored to what is used."""
        return raw.exp()


def weight_norm(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])


def spectral_norm(net: nn.Sequential) -> None:
    parametrizations.spectral_norm(net[0])


def orthogonal(net: nn.Sequential) -> None:
    parametrizations.orthogonal(net[0], orthogonal_map="cayley")


def positive(net: nn.Sequential) -> None:
    parametrize.register_parametrization(net[0], "weight", Positive())


@pytest.mark.filterwarnings("ignore:.*computed by ReverseMode:UserWarning")  # no forward-mode rules: it says so
@pytest.mark.parametrize("register", [weight_norm, spectral_norm, orthogonal, positive])
def test_parametrization_below(register: Callable[[nn.Sequential], None], check: Check) -> None:
    """The variables are the stored tensors; power iterations of the spectral norm leave no trace on each other."""
    net = mlp(5, 5)
    register(net)
    # The plain loop needs the right second derivative too.
    with ElementaryWeightNorm() if register is weight_norm else nullcontext():
        check(net, per_example(), train_loss, valid_loss, data(), data())


@pytest.mark.filterwarnings("ignore:.*computed by ReverseMode:UserWarning")
@pytest.mark.parametrize("register", [weight_norm, orthogonal, positive])
def test_parametrization_above(register: Callable[[nn.Sequential], None], check: Check) -> None:
    """The keys are the names of the stored tensors."""
    weights = mlp(1, 1, 1)
    register(weights)

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
        return (torch.sigmoid(weights(losses.detach()[:, None])).squeeze(1) * losses).mean()

    if register is orthogonal:
        weights = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        register(weights)

        def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
            logits = net(batch[0])
            losses = F.cross_entropy(logits, batch[1], reduction="none")
            return (torch.sigmoid(weights(logits.detach())).squeeze(1) * losses).mean()

    got = check(mlp(), weights, train, valid_loss, data(), data())
    assert any(name.startswith("0.parametrizations.weight.original") for name in got)


def test_frozen_parameters(check: Check) -> None:
    """What does not require a gradient is no variable, below or above."""
    net, weights = mlp(), mlp(3, 4, 1)
    net[0].requires_grad_(False)
    weights[2].bias.requires_grad_(False)

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        logits = net(batch[0])
        return (torch.sigmoid(weights(logits)).squeeze(1) * F.cross_entropy(logits, batch[1], reduction="none")).mean()

    got = check(net, weights, train, valid_loss, data(), data())
    assert list(got) == ["0.weight", "0.bias", "2.weight"]


class LowRank(nn.Module):
    """A linear layer and a correction of rank one, as LoRA adds."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(1, base.in_features).double())
        self.up = nn.Parameter(torch.randn(base.out_features, 1).double() / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Add the correction."""
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


@pytest.mark.parametrize("how", ["optimizer", "variables"])
def test_subset_of_parameters(how: str, check: Check) -> None:
    """An optimizer over a head or an adapter makes only that the variables, though all require a gradient."""
    net, weights = mlp(), mlp(3, 4, 1)
    net[0] = LowRank(net[0])  # type: ignore[arg-type]
    lower_names, upper_names = ["0.down", "0.up"], ["2.weight", "2.bias"]
    chosen = [
        [p for n, p in module.named_parameters() if n in names]
        for module, names in ((net, lower_names), (weights, upper_names))
    ]

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        logits = net(batch[0])
        return (torch.sigmoid(weights(logits)).squeeze(1) * F.cross_entropy(logits, batch[1], reduction="none")).mean()

    options: list[dict[str, Any]] = [
        {"optimizer": torch.optim.Adam(p)} if how == "optimizer" else {"variables": p} for p in chosen
    ]
    got = check(
        net,
        weights,
        train,
        valid_loss,
        data(),
        data(),
        lower_names=lower_names,
        upper_names=upper_names,
        lower_options=options[0],
        upper_options=options[1],
    )
    assert list(got) == upper_names


def test_optimizer_in_another_order(check: Check) -> None:
    """Names and values belong together, whatever the order of the optimizer's groups."""
    net, weights = mlp(), mlp(3, 3, 3)

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        return F.cross_entropy(weights(net(batch[0])), batch[1])

    groups = [
        {"optimizer": torch.optim.SGD([{"params": [p]} for p in reversed(list(m.parameters()))], lr=0.1)}
        for m in (net, weights)
    ]
    got = check(net, weights, train, train, data(), data(), lower_options=groups[0], upper_options=groups[1])
    assert list(got) == [n for n, _ in weights.named_parameters()]


class WithSpare(nn.Module):
    """A network with a branch that no loss calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2).double()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Leave the spare branch out."""
        out: Tensor = self.body(x)
        return out


class SpareWeights(nestor.Variable):
    """Weights of examples beside a parameter that no loss reads."""

    def __init__(self) -> None:
        super().__init__(torch.linspace(-1, 1, 8, dtype=torch.float64))
        self.spare = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))


def test_unused_parameters(check: Check) -> None:
    """They do not disturb below; above they get zeros of their shape."""
    got = check(WithSpare(), SpareWeights(), train_loss, valid_loss, data(), data())
    assert torch.equal(got["spare"], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", RESPONSES)
def test_unused_parameters_do_not_move(name: str, optimizer: type[torch.optim.Optimizer], bits: Bits) -> None:
    """As in a hand-written loop: no gradient, no step, not even of weight decay."""
    net, weights = WithSpare(), SpareWeights()
    before = bits([net.spare.weight, net.spare.bias, weights.spare])
    moving = bits([net.body[0].weight, weights.value])
    program = nestor.Program(
        net=nestor.Problem(
            net,
            train_loss,
            optimizer=optimizer(net.parameters(), lr=0.1, weight_decay=0.1),  # type: ignore[call-arg]
            data=[data()],
            response=RESPONSES[name],
        ),
        weights=nestor.Problem(
            weights,
            valid_loss,
            optimizer=optimizer(weights.parameters(), lr=0.1, weight_decay=0.1),  # type: ignore[call-arg]
            data=[data()],
        ),
    )
    nestor.Engine(program, seed=0).run(2)
    assert bits([net.spare.weight, net.spare.bias, weights.spare]) == before
    assert all(a != b for a, b in zip(bits([net.body[0].weight, weights.value]), moving, strict=True))


class Scaled(nn.Module):
    """A network with a temperature: a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Divide the logits by the temperature."""
        out: Tensor = self.body(x) / self.temperature
        return out


def test_scalar_parameters(check: Check) -> None:
    """Parameters without dimensions, below and above."""

    def train(batch: Batch, net: nn.Module, weights: nestor.Variable) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1]) + decayed(net, weights)

    got = check(Scaled(), nestor.Variable(torch.tensor(-2.0, dtype=torch.float64)), train, valid_loss, data(), data())
    assert got["value"].shape == ()


def test_all_scalars(by_hand: ByHand, relative_error: Error) -> None:
    """Levels of one number each: (t - w)^2 below and t^2 above has the hypergradient 2 t with an exact solve."""
    net = nestor.Variable(torch.tensor(3.0, dtype=torch.float64))
    weights = nestor.Variable(torch.tensor(3.0, dtype=torch.float64))
    program = nestor.Program(
        net=nestor.Problem(net, lambda net, weights: (net() - weights()) ** 2, response=nestor.Implicit()),
        weights=nestor.Problem(weights, lambda net: net() ** 2),
    )
    assert program.hypergradient("weights") == {"value": torch.tensor(6.0, dtype=torch.float64)}


# Buffers, nested modules, and what a loss does with them


class Standardized(nn.Module):
    """A network that standardizes its input by buffers, and has parts worth naming."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, 5, dtype=torch.float64))
        self.register_buffer("classes", torch.arange(3), persistent=False)
        self.body = nn.ModuleDict({"first": nn.Sequential(nn.Linear(5, 4), nn.Tanh()), "norm": nn.BatchNorm1d(4)})
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])
        self.gates = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.double()

    def features(self, x: Tensor) -> Tensor:
        """Run the body."""
        out: Tensor = self.body["norm"](self.body["first"](x - self.mean))
        return out

    @property
    def gate(self) -> Tensor:
        """The product of the gates."""
        product: Tensor = self.gates[0] * self.gates[1]
        return product

    def forward(self, x: Tensor) -> Tensor:
        """Average the heads."""
        features = self.features(x)
        return (self.heads[0](features) + self.heads[1](features * self.gate)) / 2


def whole(batch: Batch, net: Standardized, weights: nestor.Variable) -> Tensor:
    return train_loss(batch, net, weights)


def parts(batch: Batch, net: Standardized, weights: nestor.Variable) -> Tensor:
    x, y = batch
    features = net.body["norm"](net.body["first"](x))
    logits = features @ net.heads[1].weight.T + net.get_submodule("heads.0").bias
    return (weights().exp() * F.cross_entropy(logits, y, reduction="none")).mean()


def method(batch: Batch, net: Standardized, weights: nestor.Variable) -> Tensor:
    x, y = batch
    logits = F.linear(net.features(x) * net.gate, net.heads[0].weight)
    return (weights().exp() * F.cross_entropy(logits, y, reduction="none")).mean() + net.gate.square().sum()


def buffers(batch: Batch, net: Standardized, weights: nestor.Variable) -> Tensor:
    x, _ = batch
    logits = net(x)
    wanted = F.one_hot(net.classes[batch[1]], 3)
    running: Tensor = net.body["norm"].running_var  # type: ignore[assignment]
    distance = (logits.softmax(1) - wanted).square().sum(1) + net.mean.square().sum() * logits.sum(1)
    return (weights().exp() * distance).mean() * running.detach().clone().sum()


def functional(batch: Batch, net: Standardized, weights: nestor.Variable) -> Tensor:
    x, y = batch
    named = {n: 2 * p for n, p in net.named_parameters()}
    logits = torch.func.functional_call(net, named, (x,))
    return (weights.value.exp() * F.cross_entropy(logits, y, reduction="none")).mean()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("loss", [whole, parts, method, buffers, functional])
def test_access_inside_a_loss(loss: Loss, mode: str, check: Check) -> None:
    """Submodules, attributes, properties, methods and buffers, however nested, are those of the evaluation."""
    net = Standardized().train(mode == "train")
    if mode == "train" and loss is buffers:
        net.body["norm"].momentum = 0.5  # statistics that move within the loss that reads them
    check(net, per_example(), loss, valid_loss, data(), data())


def test_batch_norm_below_and_above(check: Check) -> None:
    """Batch statistics are differentiated through, on both levels."""
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    weights = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
        return (torch.sigmoid(weights(losses[:, None])).squeeze(1) * losses).mean()

    check(net, weights, train, valid_loss, data(), data())


@pytest.mark.parametrize("reads_both", [False, True])
def test_module_shared_by_the_modules_of_two_levels(reads_both: bool, check: Check) -> None:
    """The upper level owns an encoder that the lower level's module holds too; the lower loss may name it or not."""
    encoder = mlp(5, 4, 4)
    net = nn.Sequential(encoder, nn.Linear(4, 3)).double()
    head = list(net[1].parameters())

    def train(batch: Batch, net: nn.Sequential) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1]) + 0.1 * net[1].weight.square().sum()  # type: ignore[operator]

    def train_on_both(batch: Batch, net: nn.Sequential, encoder: nn.Module) -> Tensor:
        return train(batch, net) + F.cross_entropy(net[1](encoder(batch[0])), batch[1])

    def valid(batch: Batch, net: nn.Sequential, encoder: nn.Module) -> Tensor:
        logits = net(batch[0]) + F.linear(encoder(batch[0]), net[1].weight)  # type: ignore[arg-type]
        return F.cross_entropy(logits, batch[1])

    got = check(
        net,
        encoder,
        train_on_both if reads_both else train,
        valid,
        data(),
        data(),
        upper="encoder",
        lower_names=["1.weight", "1.bias"],
        lower_options={"variables": head},
    )
    assert list(got) == [n for n, _ in encoder.named_parameters()]


def test_parameter_shared_by_the_modules_of_two_levels(check: Check) -> None:
    """The same with a single tensor, tied across the levels' modules under two names."""
    weights = nestor.Variable(torch.randn(3, 6, dtype=torch.float64))
    net = mlp()
    net[2].weight = weights.value  # type: ignore[assignment]

    def train(batch: Batch, net: nn.Module) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    check(
        net,
        weights,
        train,
        valid_loss,
        data(),
        data(),
        lower_names=["0.weight", "0.bias", "2.bias"],
        lower_options={"variables": [*net[0].parameters(), net[2].bias]},
    )


class Siamese(nn.Module):
    """A module that is registered under two names, and a list that holds one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.right = self.left
        self.tower = nn.ModuleList([nn.Linear(5, 5)] * 2)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Call each of them twice."""
        y = self.right(self.left(x))
        out: Tensor = self.head(torch.tanh(self.tower[1](torch.tanh(self.tower[0](y)))))
        return out


def test_module_registered_twice(check: Check) -> None:
    """A module has its parameters once, however many names it has; all of them are put back."""
    check(Siamese(), per_example(), train_loss, valid_loss, data(), data())


def test_module_registered_twice_above(check: Check) -> None:
    """The same in the upper level."""

    def train(batch: Batch, net: nn.Module, weights: nn.Module) -> Tensor:
        return F.cross_entropy(weights(net(batch[0])), batch[1])

    check(mlp(5, 4, 5), Siamese(), train, train, data(), data())


@pytest.mark.parametrize("loss", [by_architecture, by_both])
def test_statistics_of_a_shared_module_stay_its_own(loss: Loss, untouched: Untouched) -> None:
    """BatchNorm in a supernet: its buffers are the same tensors after a run, and hold what the lower steps left."""
    net = Supernet()
    net.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()  # type: ignore[assignment]
    buffers, parameters = list(net.buffers()), list(net.parameters())
    program = nestor.Program(
        weights=nestor.Problem(
            net, by_weights, optimizer=torch.optim.SGD(net.weights(), lr=0.1), data=[data()], unroll_steps=2
        ),
        architecture=nestor.Problem(net, loss, optimizer=torch.optim.SGD([net.alphas], lr=1.0), data=[data()]),
    )
    batches = {"weights": data(), "architecture": data()}
    with untouched(program):
        program.hypergradient("architecture", batches)
    nestor.Engine(program, seed=0).run(4)
    assert all(a is b for a, b in zip(net.buffers(), buffers, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


# Recurrent layers in single precision


class Recurrent(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences by the last state."""
        out: Tensor = self.head(self.layer(x)[0][:, -1])
        return out


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers(layer: Callable[..., nn.RNNBase], layers: int, check: Check) -> None:
    """Double precision, train mode, no fallback."""
    net = Recurrent(layer(2, 4, layers, batch_first=True)).double()
    batches = [(torch.randn(8, 5, 2, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(2)]
    check(net, per_example(), train_loss, valid_loss, *batches)


@pytest.mark.parametrize("cross", [nestor.ForwardMode(), nestor.ReverseMode()])
@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_recurrent_layers_in_single_precision(
    layer: Callable[..., nn.RNNBase], cross: nestor.CrossDerivative, by_hand: ByHand, relative_error: Error
) -> None:
    """Torch's fused float32 LSTM has no forward mode on the CPU: one warning, and the same numbers."""
    net = Recurrent(layer(2, 4, batch_first=True)).double()
    weights = per_example()
    batches = [(torch.randn(8, 5, 2, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(2)]
    wanted = by_hand({"net": net, "weights": weights}, train_loss, valid_loss, *batches)

    level = f"{layer.__name__}_{type(cross).__name__}"  # told once a level: a name that no other test uses
    namespace: dict[str, Any] = {"train_loss": train_loss, "valid_loss": valid_loss}
    exec(  # the argument of a loss is the name of its level
        f"def train(batch, {level}, weights): return train_loss(batch, {level}, weights)\n"
        f"def valid(batch, {level}): return valid_loss(batch, {level})",
        namespace,
    )
    program = nestor.Program(
        **{level: nestor.Problem(net.float(), namespace["train"], response=nestor.T1T2(cross=cross))},
        weights=nestor.Problem(weights.float(), namespace["valid"]),
    )
    single = {name: (x.float(), y) for name, (x, y) in zip((level, "weights"), batches, strict=True)}
    got = program.hypergradient("weights", single)
    # Float32: 1e-7 a rounding, some tens of them in a row.
    assert relative_error(got, wanted) < 1e-5
    again = program.hypergradient("weights", single)["value"]
    assert torch.equal(again, got["value"])


# Variable


def test_variable_takes_a_parameter_as_it_is() -> None:
    """An optimizer may hold it already."""
    parameter = nn.Parameter(torch.zeros(3))
    variable = nestor.Variable(parameter)
    assert variable.value is parameter
    assert variable() is parameter
    assert dict(variable.named_parameters()).keys() == {"value"}


def test_variable_copies_a_tensor() -> None:
    """A later change of the tensor is not seen, and a graph is left behind."""
    tensor = torch.zeros(3, requires_grad=True)
    variable = nestor.Variable(2 * tensor)
    assert variable.value.is_leaf
    plain = torch.zeros(3)
    variable = nestor.Variable(plain)
    plain.add_(1)
    assert torch.equal(variable(), torch.zeros(3))
    with pytest.raises(TypeError, match="floating-point"):
        nestor.Variable(torch.zeros(3, dtype=torch.long))


def test_variable_with_a_parameter_of_an_optimizer() -> None:
    """The engine moves the user's own parameter along the hypergradient."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    net, weights, batch, other = mlp(), nestor.Variable(parameter), data(), data()
    program = nestor.Program(
        net=nestor.Problem(net, train_loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=[batch]),
        weights=nestor.Problem(weights, valid_loss, optimizer=optimizer, data=[other]),
    )
    start = parameter.detach().clone()
    nestor.Engine(program, seed=0).run(1)
    step = start - parameter.detach()
    with torch.no_grad():
        parameter.copy_(start)
    wanted = program.hypergradient("weights", {"net": batch, "weights": other})["value"]
    torch.testing.assert_close(step, wanted, rtol=1e-10, atol=1e-15)
