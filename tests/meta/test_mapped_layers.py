"""Layers and operations over tasks: mapped or one after the other, each task gets its own value and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestor

TASKS = 3
LABELS = torch.tensor([[0, 1, 2, -100, 4, 1], [3, 3, -100, -100, 0, 2], [4, 0, 1, 2, 3, -100]])
GENERATOR = torch.Generator().manual_seed(0)
WORDS = torch.randint(0, 7, (TASKS, 6, 4), generator=GENERATOR)
WORDS[:, :, 0] = 0
ROWS, SEQUENCES, IMAGES = (
    torch.randn(TASKS, *shape, dtype=torch.float64, generator=GENERATOR) for shape in ((6, 5), (6, 4, 5), (2, 3, 8, 8))
)


class Weighted(nn.Module):
    """An operation with a vector of five weights."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation, self.weight = operation, nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.operation(x, self.weight, labels.clamp(min=0), labels)


class First(nn.Sequential):
    """Layers that ignore the labels; of several results it takes the first."""

    def forward(self, x: Any, labels: Tensor) -> Any:
        found = super().forward(x)
        return found[0] if isinstance(found, tuple) else found


class Attention(nn.Module):
    """Self-attention with a padded key."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        padding = torch.zeros(6, 4, dtype=torch.bool)
        padding[:, 3] = True
        return self.layer(x, x, x, key_padding_mask=padding)[0]


Case = tuple[Callable[[], nn.Module], Tensor]
LAYERS: dict[str, Case] = {
    "embedding": (lambda: First(nn.Embedding(7, 3)), WORDS),
    "padding_idx": (lambda: First(nn.Embedding(7, 3, padding_idx=0)), WORDS),
    "padding_idx_from_the_end": (lambda: First(nn.Embedding(7, 3, padding_idx=-7)), WORDS),
    "scale_grad_by_freq": (lambda: First(nn.Embedding(7, 3, padding_idx=1, scale_grad_by_freq=True)), WORDS),
    "bag_mean": (lambda: First(nn.EmbeddingBag(7, 3)), WORDS),
    "bag_sum_padding": (lambda: First(nn.EmbeddingBag(7, 3, mode="sum", padding_idx=0)), WORDS),
    "bag_max": (lambda: First(nn.EmbeddingBag(7, 3, mode="max")), WORDS),
    "batch_norm": (lambda: First(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), ROWS),
    "batch_norm_2d": (lambda: First(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), IMAGES),
    "batch_norm_average": (lambda: First(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None)), ROWS),
    "instance_norm": (lambda: First(nn.Conv2d(3, 4, 3, bias=False), nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "group_norm": (lambda: First(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), IMAGES),
    "layer_norm": (lambda: First(nn.Linear(5, 4), nn.LayerNorm(4)), ROWS),
    "max_pool": (lambda: First(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), IMAGES),
    "adaptive_max_pool": (lambda: First(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(2)), IMAGES),
    "transposed": (lambda: First(nn.ConvTranspose2d(3, 2, 3)), IMAGES),
    "attention": (Attention, SEQUENCES),
    "transformer": (lambda: First(nn.TransformerEncoderLayer(5, 1, 8, 0.0, batch_first=True)), SEQUENCES),
    "lstm": (lambda: First(nn.LSTM(5, 3, batch_first=True)), SEQUENCES),
    "rnn": (lambda: First(nn.RNN(5, 3, batch_first=True)), SEQUENCES),
    "gru_cell": (lambda: First(nn.GRUCell(5, 3)), ROWS),
    "prelu": (lambda: First(nn.Linear(5, 4), nn.PReLU(4)), ROWS),
    "weight_norm": (lambda: First(torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))), ROWS),
}
Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OPERATIONS: dict[str, Operation] = {
    "index_select": lambda x, w, k, _: w.index_select(0, torch.tensor([0, 2, 2])) * x.sum(),
    "gather": lambda x, w, k, _: (x * w).gather(1, k[:, None]),
    "index": lambda x, w, k, _: w[k] * x[:, 0],
    "boolean_index": lambda x, w, k, _: (x * w)[x > 0],
    "take": lambda x, w, k, _: torch.take(w, k),
    "scatter": lambda x, w, k, _: torch.zeros_like(x).scatter(0, x.argsort(0), x * w),
    "scatter_add": lambda x, w, k, _: torch.zeros_like(x).scatter_add(0, (x > 0).long(), x * w),
    "scatter_reduce": lambda x, w, k, _: torch.zeros_like(x).scatter_reduce(0, (x > 0).long(), x * w, "amax"),
    "index_put": lambda x, w, k, _: torch.zeros_like(x).index_put((k,), x * w, accumulate=True),
    "masked_fill": lambda x, w, k, _: (x * w).masked_fill(x > 0, 0.5),
    "masked_select": lambda x, w, k, _: (x * w).masked_select(x > 0),
    "where": lambda x, w, k, _: torch.where(x > 0, x * w, w),
    "cumsum": lambda x, w, k, _: (x * w).cumsum(0),
    "cumprod": lambda x, w, k, _: (x * w).cumprod(0),
    "cummax": lambda x, w, k, _: (x * w).cummax(0)[0],
    "prod": lambda x, w, k, _: (x.relu() * w).prod(0),
    "sort": lambda x, w, k, _: (x * w).sort(0)[0][:2],
    "topk": lambda x, w, k, _: (x * w).topk(2, 0)[0],
    "median": lambda x, w, k, _: (x * w).median(),
    "in_place": lambda x, w, k, _: torch.zeros(6, 5, dtype=x.dtype).add_(x * w),
    "assigned": lambda x, w, k, _: _assigned(x * w),
    "cross_entropy": lambda x, w, k, raw: F.cross_entropy(x * w, raw),
    "class_weights": lambda x, w, k, raw: F.cross_entropy(x * w, raw, weight=torch.arange(1, 6, dtype=x.dtype)),
    "label_smoothing": lambda x, w, k, raw: F.cross_entropy(x * w, raw, label_smoothing=0.1),
    "nll": lambda x, w, k, raw: F.nll_loss((x * w).log_softmax(1), raw),
    "one_hot": lambda x, w, k, _: F.one_hot(k, 5) * w * x,
    "branch": lambda x, w, k, _: x * w if x.sum() > 0 else x - w,
    "number": lambda x, w, k, _: x * w * x.max().item(),
    "autograd_inside": lambda x, w, k, _: torch.autograd.grad(((x * w) ** 3).sum(), w, create_graph=True)[0],
    "solve": lambda x, w, k, _: torch.linalg.solve(torch.diag(w) + w.outer(w), x.T),
    "cdist": lambda x, w, k, _: torch.cdist(x, x * w + 1),
}


def _assigned(x: Tensor) -> Tensor:
    found = torch.zeros(8, 5, dtype=x.dtype)
    found[:6] = x
    return found


CASES = {**LAYERS, **{name: (lambda op=op: Weighted(op), ROWS) for name, op in OPERATIONS.items()}}


def loss(batch: Any, net: Any) -> Tensor:
    out = net(*batch)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).square().sum()


@pytest.mark.filterwarnings("ignore:.*tasks are evaluated one after the other:nestor.NestorWarning")
@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_each_task_takes_its_own_step(name: str, vectorize: bool) -> None:
    """Two steps of SGD of all tasks in an engine, against each task in plain torch."""
    make, x = CASES[name]
    torch.manual_seed(0)
    net = make().double()
    singles = [make().double() for _ in range(TASKS)]
    for single in singles:
        single.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    program = nestor.Program(
        net=nestor.Problem(net, loss, data=[(x, LABELS)], optimizer=optimizer, tasks=TASKS, vectorize=vectorize)
    )
    nestor.Engine(program, seed=0).run(2)
    for task, single in enumerate(singles):
        steps = torch.optim.SGD(single.parameters(), lr=1e-4)
        for _ in range(2):
            steps.zero_grad()
            loss((x[task], LABELS[task]), single).backward()
            steps.step()
        for copy, alone, start in zip(
            program.copies("net")[task].parameters(), single.parameters(), net.parameters(), strict=True
        ):
            size = (alone - start).abs().max().item()
            assert (copy - alone).abs().max().item() <= 1e-9 * size + 1e-15, name
