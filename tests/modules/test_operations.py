"""Losses, layers and operations of torch: forward mode, reverse mode and differences agree, or the error is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nestor

Head = Callable[[Tensor], Tensor]

SIZE = 6
ROWS = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
POSITIVE = TARGET.abs() + 0.1
SIGN = TARGET.sign()
SHARES = TARGET.softmax(1)
CLASSES = torch.tensor([0, 1, 2, 3, 1, 2])
SOME_CLASSES = torch.tensor([0, 1, -100, 3, 1, 2])
COSTS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

LOSSES: dict[str, Head] = {
    "mse": lambda z: F.mse_loss(z, TARGET),
    "mse of a target": lambda z: F.mse_loss(TARGET, z),
    "mse of an expanded target": lambda z: F.mse_loss(z, TARGET[:1].expand(SIZE, 4)),
    "mse, weighted": lambda z: nn.MSELoss()(POSITIVE * z, z.sin()),
    "l1": lambda z: F.l1_loss(z**2, TARGET),
    "smooth l1": lambda z: F.smooth_l1_loss(z, TARGET, beta=0.7),
    "huber": lambda z: F.huber_loss(z, TARGET, delta=0.5),
    "bce": lambda z: F.binary_cross_entropy(z.sigmoid(), SHARES, weight=POSITIVE),
    "bce with logits": lambda z: F.binary_cross_entropy_with_logits(z, SHARES, weight=POSITIVE, pos_weight=COSTS),
    "cross-entropy": lambda z: F.cross_entropy(z, SOME_CLASSES, weight=COSTS, label_smoothing=0.1),
    "cross-entropy of shares": lambda z: F.cross_entropy(z, SHARES, label_smoothing=0.1),
    "cross-entropy of each": lambda z: F.cross_entropy(z, SOME_CLASSES, reduction="none").sum(),
    "nll": lambda z: F.nll_loss(z.log_softmax(1), SOME_CLASSES, weight=COSTS),
    "kl": lambda z: F.kl_div(z.log_softmax(1), SHARES, reduction="batchmean"),
    "kl of two": lambda z: F.kl_div(z.log_softmax(1), (2 * z).log_softmax(1), reduction="batchmean", log_target=True),
    "poisson": lambda z: F.poisson_nll_loss(z, POSITIVE),
    "gaussian": lambda z: F.gaussian_nll_loss(z, TARGET, z.square() + 0.1, full=True),
    "cosine embedding": lambda z: F.cosine_embedding_loss(z, TARGET, SIGN[:, 0]),
    "triplet": lambda z: F.triplet_margin_loss(z, TARGET, TARGET.flip(0), margin=3.0),
    "multi margin": lambda z: F.multi_margin_loss(z, CLASSES),
    "multilabel margin": lambda z: F.multilabel_margin_loss(z**2, torch.tensor([[1, 2, -1, 0]] * SIZE)),
    "multilabel soft margin": lambda z: F.multilabel_soft_margin_loss(z, (SIGN > 0).double()),
    "hinge embedding": lambda z: F.hinge_embedding_loss(z**2, SIGN),
    "margin ranking": lambda z: F.margin_ranking_loss(z[:, 0] ** 2, z[:, 1] ** 2, SIGN[:, 0], margin=2.0),
    "soft margin": lambda z: F.soft_margin_loss(z, SIGN),
    "ctc": lambda z: F.ctc_loss(
        z.log_softmax(1).expand(5, SIZE, 4),
        CLASSES[1:4].expand(SIZE, 3),
        torch.full((SIZE,), 5),
        torch.full((SIZE,), 3),
    ),
}


def _positive(z: Tensor) -> Tensor:
    return z @ z.T + torch.eye(len(z), dtype=z.dtype)


INDEX = torch.tensor([0, 2, 1, 2])
PLACES = torch.tensor([0, 2, 1, 3]).expand(SIZE, 4)
ONES = torch.ones(SIZE, 4, dtype=torch.float64)
# Each returns a tensor; the loss is a sum of smooth functions of it.
OPERATIONS: dict[str, Head] = {
    "cdist": lambda z: torch.cdist(z, TARGET),
    "pdist": F.pdist,
    "pairwise distance": lambda z: F.pairwise_distance(z, TARGET),
    "cumsum": lambda z: z.cumsum(0),
    "cumprod": lambda z: z.cumprod(1),
    "prod of zeros": lambda z: (z * (SIGN > 0)).prod(1),
    "sort": lambda z: z.sort(1)[0] * COSTS,
    "topk": lambda z: z.topk(2, 1)[0],
    "median": lambda z: z.median(1)[0],
    "scatter": lambda z: ONES.scatter(1, PLACES, z),
    "scatter_add": lambda z: ONES.scatter_add(1, INDEX.expand(SIZE, 4), z),
    "scatter_reduce mean": lambda z: ONES.scatter_reduce(1, PLACES, z, "mean"),
    "scatter_reduce prod": lambda z: ONES.scatter_reduce(1, PLACES, z, "prod"),
    "index_add": lambda z: ONES.index_add(0, CLASSES, z),
    "gather": lambda z: z.gather(1, INDEX.expand(SIZE, 4)),
    "einsum": lambda z: torch.einsum("ij,ik,il->kl", z, z, z),
    "svd": torch.linalg.svdvals,
    "eigh": lambda z: torch.linalg.eigh(_positive(z))[0],
    "cholesky": lambda z: torch.linalg.cholesky(_positive(z)),
    "cholesky_inverse": lambda z: torch.cholesky_inverse(torch.linalg.cholesky(_positive(z))),
    "solve": lambda z: torch.linalg.solve(_positive(z), z),
    "det": lambda z: torch.linalg.det(_positive(z)),
    "slogdet": lambda z: torch.linalg.slogdet(_positive(z))[1],
    "inverse": lambda z: torch.linalg.inv(_positive(z)),
    "lstsq": lambda z: torch.linalg.lstsq(_positive(z), z)[0],
    "matrix_exp": lambda z: torch.matrix_exp(_positive(z) / 9),
    "fft": lambda z: torch.view_as_real(torch.fft.rfft(z)),
    "grid_sample": lambda z: F.grid_sample(z.view(1, 1, SIZE, 4), z[:2].tanh().view(1, 2, 2, 2), align_corners=False),
    "fold": lambda z: F.fold(z.reshape(1, 4, 6), (3, 4), 2),
    "pixel shuffle": lambda z: F.pixel_shuffle(z.reshape(1, 4, 2, 3), 2),
    "dropout": lambda z: F.dropout(z, 0.4),
    "checkpoint": lambda z: checkpoint(lambda t: F.mse_loss(t.tanh(), TARGET), z, use_reentrant=False),
}


def smooth(head: Head) -> Head:
    return lambda z: head(z).square().mean() + head(z).sin().mean()


class Module(nn.Module):
    """A layer and the function that calls it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer.double(), call

    def forward(self, shift: Tensor) -> Tensor:
        out: Tensor = self.call(self.layer, shift)
        return out


def rows(*shape: int) -> Tensor:
    return torch.randn(SIZE, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def on(*shape: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """Apply a layer to scaled rows of a shape."""
    return lambda layer, shift: smooth(layer)(rows(*shape) * (1 + shift.view(SIZE, *[1] * len(shape))))


def behind(activation: nn.Module) -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(5, 4), activation), on(5)


def convolved(layer: nn.Module) -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer), on(2, 6, 6)


class First(nn.Module):
    """The first output of a layer that is called with copies of its input."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(*[x] * self.times)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


IDS = torch.randint(0, 9, (SIZE, 4), generator=torch.Generator().manual_seed(3))
IDS[:, 2:] = 0


def looked_up(layer: nn.Module) -> tuple[nn.Module, Any]:
    return layer, lambda e, shift: (shift.sigmoid() * smooth_rows(e(IDS))).mean()


def smooth_rows(x: Tensor) -> Tensor:
    return (x.square() + x.sin()).flatten(1).sum(1)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "Conv1d": lambda: (nn.Conv1d(2, 3, 3, padding=1), on(2, 7)),
    "Conv2d": lambda: (nn.Conv2d(2, 4, 3, groups=2, stride=2, padding=1, padding_mode="circular"), on(2, 6, 6)),
    "Conv3d": lambda: (nn.Conv3d(2, 3, 3), on(2, 4, 4, 4)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(2, 3, 3, stride=2), on(2, 5, 5)),
    "BatchNorm1d": lambda: behind(nn.BatchNorm1d(4)),
    "BatchNorm2d in eval mode": lambda: convolved(nn.BatchNorm2d(4).eval()),
    "GroupNorm": lambda: convolved(nn.GroupNorm(2, 4)),
    "InstanceNorm2d": lambda: convolved(nn.InstanceNorm2d(4, affine=True)),
    "LayerNorm": lambda: behind(nn.LayerNorm(4)),
    "RMSNorm": lambda: behind(nn.RMSNorm(4)),
    "SiLU": lambda: behind(nn.SiLU()),
    "Mish": lambda: behind(nn.Mish()),
    "GELU": lambda: behind(nn.GELU()),
    "Hardswish": lambda: behind(nn.Hardswish()),
    "Hardsigmoid": lambda: behind(nn.Hardsigmoid()),
    "PReLU": lambda: behind(nn.PReLU()),
    "Softmax": lambda: behind(nn.Softmax(1)),
    "AlphaDropout": lambda: behind(nn.AlphaDropout(0.4)),
    "AdaptiveAvgPool2d": lambda: convolved(nn.AdaptiveAvgPool2d(2)),
    "MaxPool2d": lambda: convolved(nn.MaxPool2d(2)),
    "LPPool2d": lambda: convolved(nn.LPPool2d(2, 2)),
    "Upsample": lambda: convolved(nn.Upsample(scale_factor=2, mode="bilinear")),
    "PixelShuffle": lambda: convolved(nn.PixelShuffle(2)),
    "Unfold": lambda: convolved(nn.Unfold(3)),
    "Bilinear": lambda: (First(nn.Bilinear(5, 5, 3), 2), on(5)),
    "GRU": lambda: (First(nn.GRU(5, 4, 2, batch_first=True)), on(3, 5)),
    "LSTM": lambda: (First(nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)), on(3, 5)),
    "RNN": lambda: (First(nn.RNN(5, 4, batch_first=True)), on(3, 5)),
    "LSTMCell": lambda: (First(nn.LSTMCell(5, 4)), on(5)),
    "MultiheadAttention": lambda: (First(nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.2), 3), on(3, 4)),
    "TransformerEncoderLayer": lambda: (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), on(3, 4)),
    "TransformerDecoderLayer": lambda: (First(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 2), on(3, 4)),
    "Embedding": lambda: looked_up(nn.Embedding(9, 3)),
    "sparse Embedding": lambda: looked_up(nn.Embedding(9, 3, sparse=True)),
    "EmbeddingBag": lambda: looked_up(nn.EmbeddingBag(9, 3)),
}

CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: lambda h=head: behind_loss(h) for name, head in LOSSES.items()},  # type: ignore[misc]
    **{name: lambda h=head: behind_loss(smooth(h)) for name, head in OPERATIONS.items()},  # type: ignore[misc]
    **LAYERS,
}
# Torch has no derivative of their derivatives.
NO_SECOND_DERIVATIVE = {
    *("multi margin", "multilabel margin", "ctc", "cdist", "pdist", "Hardsigmoid", "EmbeddingBag"),
}  # fmt: skip


def behind_loss(head: Head) -> tuple[nn.Module, Any]:
    return nn.Linear(5, 4), lambda layer, shift: head(layer(ROWS * (1 + shift[:, None])))


def hypergradient(name: str, cross: nestor.CrossDerivative) -> tuple[Tensor, list[str]]:
    torch.manual_seed(0)
    net, shift = Module(*CASES[name]()), nestor.Variable(torch.linspace(-0.3, 0.5, SIZE, dtype=torch.float64))

    def valid(net: Module) -> Tensor:
        return torch.stack([(p * torch.linspace(-2, 3, p.numel()).view_as(p)).sum() for p in net.parameters()]).sum()

    program = nestor.Program(
        net=nestor.Problem(net, lambda net, shift: net(shift()), response=nestor.T1T2(cross=cross)),
        shift=nestor.Problem(shift, valid),
    )
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", nestor.NestorWarning)
        value = program.hypergradient("shift")["value"]
    return value, [str(warning.message) for warning in told if warning.category is nestor.NestorWarning]


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_reverse_mode_and_differences_agree(name: str) -> None:
    """Where torch lacks a rule, reverse mode replaces forward mode with one warning, or the error names a remedy."""
    if name in NO_SECOND_DERIVATIVE:
        for cross in (nestor.ForwardMode(), nestor.ReverseMode()):
            with pytest.raises(nestor.LossError, match=r"level 'net', loss .*FiniteDifference\(\)"):
                hypergradient(name, cross)
        return
    reverse, _ = hypergradient(name, nestor.ReverseMode())
    forward, told = hypergradient(name, nestor.ForwardMode())
    assert len(told) <= 1
    assert all("Level 'net'" in text and "ReverseMode()" in text for text in told)
    differences, _ = hypergradient(name, nestor.CentralDifference(rel_step=1e-5))
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(reverse, differences, rtol=1e-5, atol=1e-7)
