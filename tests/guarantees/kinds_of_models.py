"""Kinds of models, of their layers, and of their optimizers and data."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kinds import MLP, Words
from setups import SAMPLES, AfterStep, Batch, Setup, inputs, tokens, weighted
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from truth import MOMENTUM, RATE, momentum


class Dropping(MLP):
    """Dropout; ``checkpoints`` evaluates the block again in the backward pass."""

    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.dropout, self.checkpoints = nn.Dropout(0.5), checkpoints

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.hidden(x)))

    def forward(self, x: Tensor) -> Tensor:
        is_deep = self.checkpoints and self.training
        return checkpoint(self.block, x, use_reentrant=False) if is_deep else self.block(x)


def _dropping(net: Dropping) -> Setup:
    latest: list[Tensor] = []
    states: list[Tensor] = []
    twin = Dropping()

    def loss(batch: Any, net: nn.Module, w: nn.Module) -> Tensor:
        latest[:] = [torch.get_rng_state()]
        return weighted(net(batch[0]), batch, w())

    def plain(call: Callable[..., Any], batch: Any, w: Tensor, step: int) -> Tensor:
        with torch.random.fork_rng():
            torch.set_rng_state(states[min(step, len(states) - 1)])
            return weighted(call(batch[0]), batch, w)

    def upper(batch: Any, net: nn.Module) -> Tensor:
        net.eval()
        out = net(batch[0])
        net.train()
        return (out - batch[1]).square().mean()

    return Setup(
        net,
        twin,
        loss=loss,
        plain=plain,
        upper=upper,
        plain_upper=lambda call, batch: upper(batch, _Called(twin, call)),
        callbacks=[AfterStep(lambda: states.extend(latest))],
        record=states,
    )


class _Called(nn.Module):
    """A module that is called with other parameters; it passes modes on."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = module, call

    def forward(self, x: Any) -> Any:
        return self.call(x)


def dropout() -> Setup:
    """Dropout; the upper loss switches to eval mode and back"""
    return _dropping(Dropping())


def checkpointed_dropout() -> Setup:
    """`checkpoint(use_reentrant=False)` with dropout"""
    return _dropping(Dropping(checkpoints=True))


def batch_norm() -> Setup:
    """BatchNorm in train mode"""

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(self.first(x)))

    return Setup(Net())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(3, 2, batch_first=True).double(), nn.Linear(2, 1).double()

    def forward(self, x: Any) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def sequences(shift: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(shift)
    return torch.randn(SAMPLES, 3, 3, generator=generator).double(), *inputs(shift)[1:]


def packed(shift: int = 0) -> Batch:
    x, y, rows = sequences(shift)
    lengths = torch.tensor([3, 2, 3, 1, 3, 2])
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), y, rows


def lstm() -> Setup:
    """LSTM"""
    return Setup(Recurrent(), data=sequences)


def packed_sequence() -> Setup:
    """LSTM on a `PackedSequence`"""
    assert isinstance(packed()[0], PackedSequence)
    return Setup(Recurrent(), data=packed)


def attention() -> Setup:
    """`MultiheadAttention`"""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.into, self.out = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x)
            return self.out(self.attention(h, h, h)[0].mean(1))

    return Setup(Net(), data=sequences)


def _with_moving_buffers(net: nn.Module) -> Setup:
    """The buffers before each evaluation are what the steps before have left."""

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in net.named_buffers()}

    seen = [buffers()]

    def copies(step: int) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in seen[step].items()}

    return Setup(
        net,
        plain=lambda call, batch, w, step: weighted(call(batch[0], copies(step)), batch, w),
        plain_upper=lambda call, batch: (call(batch[0], copies(-1)) - batch[1]).square().mean(),
        callbacks=[AfterStep(lambda: seen.append(buffers()))],
        record=seen,
    )


def spectral_parametrization() -> Setup:
    """`parametrizations.spectral_norm`, whose vectors move"""
    net = MLP()
    parametrizations.spectral_norm(net.first)
    return _with_moving_buffers(net)


def spectral_hook() -> Setup:
    """`torch.nn.utils.spectral_norm`, whose vectors move"""
    net = MLP()
    torch.nn.utils.spectral_norm(net.first)
    return _with_moving_buffers(net)


def orthogonal() -> Setup:
    """`parametrizations.orthogonal`"""
    net = MLP()
    parametrizations.orthogonal(net.first, orthogonal_map="cayley")
    return Setup(net)


def pruned() -> Setup:
    """`torch.nn.utils.prune`"""
    net = MLP()
    prune.l1_unstructured(net.first, "weight", amount=0.3)
    return Setup(net)


def data_parallel_module() -> Setup:
    """`nn.DataParallel(net)`, on a CPU"""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    return Setup(nn.DataParallel(MLP()), Twin())


def tied_weights() -> Setup:
    """Tied weights"""

    class Net(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.back = nn.Linear(4, 4).double()
            self.again = nn.Linear(4, 4).double()
            self.again.weight = self.back.weight

        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh(self.again(torch.tanh(self.back(super().hidden(x)))))

    return Setup(Net())


def scaled_by_frequency() -> Setup:
    """`Embedding(scale_grad_by_freq=True)`: the gradient of no loss"""
    return Setup(Words(scale_grad_by_freq=True), Words(), data=tokens)


def embedding_bag() -> Setup:
    """`EmbeddingBag`"""

    class Net(Words):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.EmbeddingBag.from_pretrained(self.embedding.weight.detach(), freeze=False)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(words)))

    return Setup(Net(), Words(), data=tokens)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ctx.save_for_backward((1 - out**2).detach())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


def fused_kernel() -> Setup:
    """A custom `Function` that saves its derivative in the forward, as fused kernels do"""

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return _Fused.apply(self.first(x))

    return Setup(Net(), MLP())


def learned_sparse_matrix() -> Setup:
    """`torch.sparse`, with learned values"""

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.sparse.mm(self.first.weight.to_sparse(), x.T).T + self.first.bias)

    return Setup(Net(), MLP())


def constant_sparse_matrix() -> Setup:
    """`torch.sparse`, constant"""
    mask = (torch.arange(16).view(4, 4) % 3 > 0).double()

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.sparse.mm(mask.to_sparse(), self.first(x).T).T)

    class Twin(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            return torch.tanh((mask @ self.first(x).T).T)

    return Setup(Net(), Twin())


def straight_through() -> Setup:
    """Rounding with a straight-through gradient"""

    class Net(MLP):
        def hidden(self, x: Tensor) -> Tensor:
            h = super().hidden(x)
            return h + (torch.round(4 * h) / 4 - h).detach()

    return Setup(Net())


def hidden_state() -> Setup:
    """A module that keeps a hidden state as an attribute"""

    class Net(MLP):
        state: Tensor | float = 0.0

        def hidden(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x)) + 0.5 * self.state
            self.state = h.detach()
            return h

    return Setup(Net(), MLP())


def adam_groups() -> Setup:
    """AdamW with two groups"""
    options = [(0.02, 0.1, 2), (0.05, 0.0, 2)]  # rate, weight decay, tensors

    def make(net: Any) -> AdamW:
        parts = (net.first, net.second)
        return AdamW(
            [
                {"params": part.parameters(), "lr": rate, "weight_decay": decay}
                for part, (rate, decay, _) in zip(parts, options, strict=True)
            ]
        )

    def rule(theta: list[Tensor], grads: list[Tensor], memory: Any) -> tuple[list[Tensor], Any]:
        first, second, count = memory or ([0.0] * len(theta), [0.0] * len(theta), 0)
        count += 1
        first = [0.9 * m + 0.1 * g for m, g in zip(first, grads, strict=True)]
        second = [0.999 * v + 0.001 * g**2 for v, g in zip(second, grads, strict=True)]
        each = [(rate, decay) for rate, decay, number in options for _ in range(number)]
        after = [
            t * (1 - rate * decay) - rate * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
            for t, m, v, (rate, decay) in zip(theta, first, second, each, strict=True)
        ]
        return after, (first, second, count)

    return Setup(MLP(), make=make, rule=rule)


def decay_and_clipping() -> Setup:
    """Weight decay and `clip_norm`"""

    def rule(theta: list[Tensor], grads: list[Tensor], memory: Any) -> tuple[list[Tensor], Any]:
        norm = torch.cat([g.reshape(-1) for g in grads]).norm()
        factor = (0.2 / (norm + 1e-6)).clamp(max=1)
        return momentum(theta, [factor * g + 0.1 * t for g, t in zip(grads, theta, strict=True)], memory)

    return Setup(
        MLP(),
        make=lambda net: SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=0.1),
        rule=rule,
        options=lambda: {"clip_norm": 0.2},
    )


def schedule() -> Setup:
    """A learning-rate schedule"""
    held: list[Any] = []

    def make(net: nn.Module) -> SGD:
        optimizer = SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
        held.append(StepLR(optimizer, 2, 0.5))
        return optimizer

    def rule(theta: list[Tensor], grads: list[Tensor], memory: Any) -> tuple[list[Tensor], Any]:
        velocity, count = memory or (None, 0)
        after, velocity = momentum(theta, grads, velocity)
        factor = 0.5 ** (count // 2)
        return [t + factor * (a - t) for t, a in zip(theta, after, strict=True)], (velocity, count + 1)

    return Setup(MLP(), make=make, rule=rule, options=lambda: {"scheduler": held[0]})


def fused() -> Setup:
    """`SGD(fused=True)`"""
    return Setup(MLP(), make=lambda net: SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, fused=True))


def foreach() -> Setup:
    """`SGD(foreach=True)`"""
    return Setup(MLP(), make=lambda net: SGD(net.parameters(), lr=RATE, momentum=MOMENTUM, foreach=True))


def lbfgs() -> Setup:
    """LBFGS"""
    return Setup(MLP(), make=lambda net: LBFGS(net.parameters()))


def workers() -> Setup:
    """A `DataLoader` with a worker"""
    # Not forked from this process: in the two processes, CPython 3.11 may hang at a fork beside gloo's threads.
    multiprocessing.set_forkserver_preload(["rows", "nestor"])
    options: Any = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "forkserver"}
    return Setup(MLP(), loader=lambda batch: DataLoader(TensorDataset(*batch), SAMPLES, **options))


def generator() -> Setup:
    """Data from a generator"""

    def forever(batch: Batch) -> Iterator[Batch]:
        while True:
            yield batch

    return Setup(MLP(), loader=forever)


MODELS: dict[str, Callable[[], Setup]] = {
    make.__name__: make
    for make in (
        dropout,
        checkpointed_dropout,
        batch_norm,
        lstm,
        packed_sequence,
        attention,
        spectral_parametrization,
        spectral_hook,
        orthogonal,
        pruned,
        data_parallel_module,
        tied_weights,
        scaled_by_frequency,
        fused_kernel,
        learned_sparse_matrix,
        constant_sparse_matrix,
        embedding_bag,
        straight_through,
        hidden_state,
        adam_groups,
        decay_and_clipping,
        schedule,
        fused,
        foreach,
        lbfgs,
        workers,
        generator,
    )
}
