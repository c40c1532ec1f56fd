"""Second derivatives of attention, whose fused kernels have none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

ByHand = Callable[..., dict[str, Tensor]]
Error = Callable[[dict[str, Tensor], dict[str, Tensor]], float]
Batch = Mapping[str, Tensor]

DAMPING = 200.0
CG = nestor.ConjugateGradient(max_steps=300, rtol=1e-13)
EXACT = {
    "default": nestor.T1T2(),
    "forward": nestor.T1T2(cross=nestor.ForwardMode()),
    "reverse": nestor.T1T2(cross=nestor.ReverseMode()),
    "cg": nestor.Implicit(solver=CG, damping=DAMPING),
    "cg-forward": nestor.Implicit(solver=CG, damping=DAMPING, cross=nestor.ForwardMode()),
}


def damping_of(name: str) -> float | None:
    return DAMPING if name.startswith("cg") else None


class MultiHead(nn.Module):
    """Torch's own attention layer, with or without the weights that keep it from the fused kernel."""

    def __init__(self, *, need_weights: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        out: Tensor = self.head(self.attention(x, x, x, need_weights=self.need_weights)[0].mean(1))
        return out


class Functional(nn.Module):
    """A call of the functional, one head."""

    def __init__(self, *, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.project = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        q, k, v = self.project(x)[:, None].chunk(3, dim=-1)
        out: Tensor = self.head(F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)[:, 0].mean(1))
        return out

    def by_definition(self, x: Tensor) -> Tensor:
        """Compute the same from the formula."""
        q, k, v = self.project(x).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / 8**0.5
        if self.is_causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        out: Tensor = self.head((scores.softmax(-1) @ v).mean(1))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "multihead": MultiHead,
    "multihead-weights": lambda: MultiHead(need_weights=True),
    "multihead-dropout": lambda: MultiHead(dropout=0.2),
    "functional": Functional,
    "causal": lambda: Functional(is_causal=True),
}


def train_loss(batch: tuple[Tensor, Tensor], net: nn.Module, weights: nestor.Variable) -> Tensor:
    x, y = batch
    return (weights().exp() * F.cross_entropy(net(x), y, reduction="none")).mean()


def valid_loss(batch: tuple[Tensor, Tensor], net: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y)


def small(name: str, *, train: bool) -> tuple[dict[str, nn.Module], dict[str, tuple[Tensor, Tensor]]]:
    net = NETS[name]().double().train(train)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)  # attention that is not uniform
    batches = {
        level: (torch.randn(6, 5, 8, dtype=torch.float64), torch.randint(0, 3, (6,))) for level in ("net", "weights")
    }
    return {"net": net, "weights": nestor.Variable(torch.zeros(6, dtype=torch.float64))}, batches


def hypergradient(
    modules: Mapping[str, nn.Module],
    batches: Mapping[str, Any],
    response: nestor.Response,
    train: Callable[..., Any] = train_loss,
    valid: Callable[..., Any] = valid_loss,
) -> dict[str, Tensor]:
    program = nestor.Program(
        net=nestor.Problem(modules["net"], train, response=response), weights=nestor.Problem(modules["weights"], valid)
    )
    torch.manual_seed(4)
    return program.hypergradient("weights", batches)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("response", EXACT)
@pytest.mark.parametrize("name", NETS)
def test_layers(name: str, response: str, mode: str, by_hand: ByHand, relative_error: Error) -> None:
    """Against double backward on the math kernel; a fallback of forward mode would warn and fail."""
    modules, batches = small(name, train=mode == "train")
    got = hypergradient(modules, batches, EXACT[response])
    wanted = by_hand(
        modules, train_loss, valid_loss, batches["net"], batches["weights"], seed=4, damping=damping_of(response)
    )
    assert relative_error(got, wanted) < 1e-10


@pytest.mark.parametrize("response", EXACT)
@pytest.mark.parametrize("name", ["functional", "causal"])
def test_functional_against_its_formula(name: str, response: str, by_hand: ByHand, relative_error: Error) -> None:
    """Softmax by hand, so the oracle has no attention kernel at all."""
    modules, batches = small(name, train=False)
    got = hypergradient(modules, batches, EXACT[response])

    def train(batch: tuple[Tensor, Tensor], net: Functional, weights: nestor.Variable) -> Tensor:
        return (weights().exp() * F.cross_entropy(net.by_definition(batch[0]), batch[1], reduction="none")).mean()

    def valid(batch: tuple[Tensor, Tensor], net: Functional) -> Tensor:
        return F.cross_entropy(net.by_definition(batch[0]), batch[1])

    wanted = by_hand(modules, train, valid, batches["net"], batches["weights"], damping=damping_of(response))
    assert relative_error(got, wanted) < 1e-10


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_finite_difference(name: str, mode: str, relative_error: Error) -> None:
    """Any kernel serves it; its error is of second order in its step."""
    modules, batches = small(name, train=mode == "train")
    exact = hypergradient(modules, batches, nestor.T1T2())
    assert relative_error(hypergradient(modules, batches, nestor.FiniteDifference()), exact) < 1e-3


def test_objective_is_twice_differentiable() -> None:
    """Against the derivative of the T1-T2 formula, in which theta answers to the weights as T1-T2 says."""
    modules, batches = small("functional", train=False)
    net, weights = modules["net"], modules["weights"]
    assert isinstance(weights, nestor.Variable)
    program = nestor.Program(net=nestor.Problem(net, train_loss), weights=nestor.Problem(weights, valid_loss))
    v = torch.randn(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(program.objective("weights", batches), weights.value, create_graph=True)
    (got,) = torch.autograd.grad(gradient, weights.value, v)

    theta, (lam,) = list(net.parameters()), weights.parameters()
    by_definition = SimpleNamespace(net=net.by_definition, weights=weights)

    def mixed(cotangent: Sequence[Tensor], *, create_graph: bool) -> Tensor:
        loss = train_loss(batches["net"], by_definition.net, by_definition.weights)
        gradient = torch.autograd.grad(loss, theta, create_graph=True)
        (product,) = torch.autograd.grad(gradient, lam, cotangent, create_graph=create_graph)
        return product

    cotangent = torch.autograd.grad(valid_loss(batches["weights"], by_definition.net), theta, create_graph=True)
    hypergradient = -mixed(cotangent, create_graph=True)
    direct, *through_theta = torch.autograd.grad(hypergradient, [lam, *theta], v)
    wanted = direct - mixed(through_theta, create_graph=False)
    assert (got - wanted).norm() < 1e-10 * wanted.norm()


# A Hugging Face model


def bert(implementation: str | None = None, **options: Any) -> nn.Module:
    """A tiny BERT of random weights, the same on every call."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.1,
        **({} if implementation is None else {"attn_implementation": implementation}),
        **options,
    )
    torch.manual_seed(1)
    net: nn.Module = transformers.BertForSequenceClassification(config).double()
    return net


def text(size: int = 4) -> Any:
    """A ``BatchEncoding`` with padding."""
    mask = torch.ones(size, 7, dtype=torch.long)
    mask[0, 5:] = 0
    mask[1, 3:] = 0
    return transformers.BatchEncoding(
        {
            "input_ids": torch.randint(0, 50, (size, 7)),
            "attention_mask": mask,
            "labels": torch.randint(0, 3, (size,)),
        }
    )


def weighted_text(batch: Any, net: nn.Module, weights: nestor.Variable) -> Tensor:
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (weights().exp() * F.cross_entropy(logits, batch["labels"], reduction="none")).mean()


def model_output(batch: Any, net: nn.Module) -> Any:
    """Return what the model returns: a mapping with the loss and, not a scalar, the logits."""
    return net(**batch)


def regularized(batch: Any, net: nn.Module, weights: nestor.Variable) -> Any:
    """Return the model's own output object with another loss in it."""
    output = net(**batch)
    output["loss"] = output["loss"] + sum((weights()[0].exp() * p.square()).sum() for p in net.parameters())
    return output


def with_bert(net: nn.Module, *, train: bool) -> dict[str, nn.Module]:
    return {"net": net.train(train), "weights": nestor.Variable(torch.linspace(-1, 1, 4, dtype=torch.float64))}


def texts() -> dict[str, Any]:
    torch.manual_seed(2)
    return {"net": text(), "weights": text()}


def test_default_implementation_is_fused() -> None:
    """The tests below mean something: the model's default attention has no double backward in eval mode."""
    net = bert().eval()
    assert net.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    batch = texts()["net"]
    parameters = [p for n, p in net.named_parameters() if "query" in n]
    gradient = torch.autograd.grad(net(**batch).loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(g.square().sum() for g in gradient), parameters)


@pytest.mark.parametrize("loss", [weighted_text, regularized])
@pytest.mark.parametrize("response", EXACT)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bert_against_eager_attention(
    mode: str, response: str, loss: Callable[..., Any], by_hand: ByHand, relative_error: Error
) -> None:
    """The oracle is the same model with attention written out; dropout everywhere but on the attention weights."""
    options = {"attention_probs_dropout_prob": 0.0}
    batches = texts()
    got = hypergradient(with_bert(bert(**options), train=mode == "train"), batches, EXACT[response], loss, model_output)
    eager = with_bert(bert("eager", **options), train=mode == "train")
    wanted = by_hand(
        eager, loss, model_output, batches["net"], batches["weights"], seed=4, damping=damping_of(response)
    )
    # Two ways to compute attention differ by rounding, which a condition number of about 10 magnifies.
    assert relative_error(got, wanted) < 1e-9


@pytest.mark.parametrize("response", ["default", "forward", "reverse", "cg"])
def test_bert_with_dropout_on_attention(response: str, by_hand: ByHand, relative_error: Error) -> None:
    """Train mode as configured by default, against double backward on the math kernel, on the same masks."""
    modules, batches = with_bert(bert(), train=True), texts()
    got = hypergradient(modules, batches, EXACT[response], weighted_text, model_output)
    wanted = by_hand(
        modules, weighted_text, model_output, batches["net"], batches["weights"], seed=4, damping=damping_of(response)
    )
    assert relative_error(got, wanted) < 1e-9


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bert_finite_difference(mode: str, relative_error: Error) -> None:
    """One pair of masks, any kernel."""
    modules, batches = with_bert(bert(), train=mode == "train"), texts()
    exact = hypergradient(modules, batches, nestor.T1T2(), weighted_text, model_output)
    got = hypergradient(modules, batches, nestor.FiniteDifference(), weighted_text, model_output)
    assert relative_error(got, exact) < 1e-3


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bert_in_an_engine(mode: str) -> None:
    """A run on ``BatchEncoding`` batches, both losses from the model's own output; its scalars are the metrics."""
    modules, batches = with_bert(bert(), train=mode == "train"), texts()
    net, weights = modules["net"], modules["weights"]
    program = nestor.Program(
        net=nestor.Problem(
            net, regularized, optimizer=torch.optim.SGD(net.parameters(), lr=1e-3), data=[batches["net"]]
        ),
        weights=nestor.Problem(
            weights, model_output, optimizer=torch.optim.SGD(weights.parameters(), lr=1.0), data=[batches["weights"]]
        ),
    )
    assert isinstance(weights, nestor.Variable)
    start = weights.value.detach().clone()
    engine = nestor.Engine(program, seed=0)
    with pytest.warns(nestor.NestorWarning, match="'net' is in eval mode") if mode == "eval" else nullcontext():
        metrics = engine.run(1)
    assert set(metrics) == {
        "net/loss",
        "net/gradient_norm",
        "weights/loss",
        "weights/gradient_norm",
        "weights/indirect_share",
    }
    step = start - weights.value.detach()
    assert step.norm() > 0
    if mode == "eval":
        # Without dropout the hypergradient can be computed again, at the point where the upper level found the net.
        with torch.no_grad():
            weights.value.copy_(start)
        torch.testing.assert_close(step, program.hypergradient("weights", batches)["value"], rtol=1e-9, atol=1e-12)
