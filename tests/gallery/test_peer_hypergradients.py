"""The programs of ``examples/peers``: both libraries compute the same hypergradient where their methods are the same.

They need Betty, TorchOpt and higher: ``.venv-peers/bin/python -m pytest tests/gallery/test_peer_hypergradients.py``.
"""

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import nestor
from shared.batches import Batches
from shared.tasks import Network

if TYPE_CHECKING:
    from shared.betty_levels import BettyLevel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what these libraries import
    for _name in ("betty.engine", "higher", "torchopt"):
        pytest.importorskip(_name)
PEERS = Path(__file__).parents[2] / "examples" / "peers"
pytestmark = pytest.mark.filterwarnings("default")  # other libraries warn of what they use


def program_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def first_moment(optimizer: torch.optim.Optimizer) -> Tensor:
    """After the first step of Adam, a tenth of its gradient."""
    return torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])


def first_moments(
    program: nestor.Program, levels: "list[BettyLevel]", upper: str, steps: int, length: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Run both libraries until the first upper step; in double precision Betty's differences may be short."""
    from shared.betty_levels import betty_engine

    for level in levels:
        level.config.darts_alpha = length
    nestor.Engine(program, seed=0).run(steps)
    betty_engine(levels, steps).run()
    ours = program.levels[upper].problem.optimizer
    (theirs,) = (level.optimizer for level in levels if level.name == upper)
    assert ours is not None
    return first_moment(ours), first_moment(theirs)


def test_maml() -> None:
    peer, generator = program_of("few_shot"), torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 5, 1, 28, 28, generator=generator), torch.arange(5).expand(4, -1)
    support, query = (images, labels), (images.flip(4), labels)
    torch.manual_seed(0)
    meta = Network(channels=16)
    program = peer.nestor_program(copy.deepcopy(meta), [(support, query)], 1, 0.1)
    ours = list(program.hypergradient("meta", {"fast": support, "meta": query}).values())
    by_torchopt, by_higher = copy.deepcopy(meta), copy.deepcopy(meta)
    peer.torchopt_loss(by_torchopt, peer.torchopt.MetaSGD(by_torchopt, lr=0.1), support, query).backward()
    peer.higher_backward(by_higher, SGD(by_higher.parameters(), lr=0.1), support, query)
    for network in (by_torchopt, by_higher):
        expected = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        assert relative(torch.cat([value.flatten() for value in ours]), expected) < 1e-11


def weight_decay_task(peer: ModuleType):
    inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 1] + inputs[:, 2] > 0).double()
    inputs[:, 0] = 1
    return peer.Task((inputs[:30], labels[:30]), (inputs[30:], labels[30:]), 0.03)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("nestor, Neumann", "Betty, Neumann"), ("nestor, T1T2", "Betty, finite differences")]
)
def test_weight_decay(ours: str, theirs: str) -> None:
    peer = program_of("weight_decay")
    task = weight_decay_task(peer)
    program, levels = (
        peer.nestor_program(task, peer.RESPONSES[ours], 0.1),
        peer.betty_levels(task, peer.CONFIGS[theirs], 0.1),
    )
    found, expected = first_moments(program, levels, "logs", peer.UNROLL)
    assert relative(found, expected) < 1e-9


def test_weight_decay_by_conjugate_gradients() -> None:
    """nestor's are those of the textbook; Betty's second direction is computed from the residual before."""
    peer = program_of("weight_decay")
    task = weight_decay_task(peer)
    name, iterations = "conjugate gradients", 5
    program = peer.nestor_program(task, peer.RESPONSES[f"nestor, {name}"], 0.0)
    found, other = first_moments(
        program, peer.betty_levels(task, peer.CONFIGS[f"Betty, {name}"], 0.0), "logs", peer.UNROLL
    )
    weights, logs = (program.levels[level].problem.module().detach() for level in ("weights", "logs"))

    def loss(weights: Tensor, logs: Tensor) -> Tensor:
        return task.weights_loss(task.train, lambda: weights, lambda: logs)

    hessian = torch.func.hessian(loss)(weights, logs)
    mixed = torch.func.jacrev(torch.func.grad(loss), argnums=1)(weights, logs)
    cotangent = torch.func.grad(lambda weights: peer.loss_on(task.guide, weights))(weights)

    def solved(of_new_residual: bool) -> Tensor:
        solution, residual, direction = torch.zeros_like(cotangent), cotangent, cotangent
        for _ in range(iterations):
            length = residual.square().sum() / (direction @ hessian @ direction)
            solution = solution + length * direction
            after = residual - length * (hessian @ direction)
            ratio = after.square().sum() / residual.square().sum()
            direction = (after if of_new_residual else residual) + ratio * direction
            residual = after
        return -0.1 * mixed.T @ solution

    assert relative(found, solved(of_new_residual=True)) < 1e-9
    assert relative(other, solved(of_new_residual=False)) < 1e-9
    assert relative(other, solved(of_new_residual=True)) > 0.05


def test_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, generator = program_of("dataset_distillation"), torch.Generator().manual_seed(0)
    monkeypatch.setattr(peer, "Adam", SGD)  # a step is the gradient
    images, labels = torch.rand(40, 1, 28, 28, generator=generator), torch.arange(40) % 10
    moved = []
    for distil in peer.METHODS.values():
        distilled = peer.Distilled(images[:10])
        distil(distilled, peer.SameBatches(images, labels, size=32, seed=0), 2, 1.0)
        moved.append(torch.cat([(distilled.images - images[:10]).flatten(), distilled.logits.flatten()]).detach())
    assert len(moved) == 3
    for other in moved[1:]:
        assert relative(moved[0], other) < 1e-9
    assert moved[0][:-100].norm() > 1e-3


def test_reweight_and_correct() -> None:
    """Both upper levels; the losses that the weights read are moved by a difference, though they are detached.

    Betty's second upper level sees the first one after its step, so the rate is small here.
    """
    peer, generator = program_of("reweight_and_correct"), torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 12, generator=generator), torch.arange(60) % 20
    noisy, guide = (
        peer.Batches(features[:40], labels[:40], size=100),
        peer.Batches(features[40:], labels[40:], size=100),
    )
    response = nestor.FiniteDifference(rel_step=1e-6)
    program, levels = peer.nestor_program(noisy, guide, 0, 1e-9, response), peer.betty_levels(noisy, guide, 0, 1e-9)
    found, expected = first_moments(program, levels, "weights", 1)
    assert relative(found, expected) < 1e-3
    correction = program.levels["correction"].problem.optimizer
    assert correction is not None
    assert relative(first_moment(correction), first_moment(levels[2].optimizer)) < 1e-3


def test_pretrain_finetune_reweight() -> None:
    peer, generator = program_of("pretrain_finetune_reweight"), torch.Generator().manual_seed(0)

    def batches(count: int) -> tuple[Tensor, Tensor]:
        return torch.rand(count, 1, 28, 28, generator=generator), torch.arange(count) % 10

    parts = [peer_batches(*batches(20), torch.arange(20)), peer_batches(*batches(10)), peer_batches(*batches(12))]
    data = peer.Domains(*parts, parts[1], batches(5), torch.zeros(20))
    program = peer.nestor_program(data, 0, 10, 0.1, nestor.T1T2())
    found, expected = first_moments(program, peer.betty_levels(data, 0, 10, 0.1), "weights", 1)
    assert relative(found, expected) < 1e-2


def peer_batches(*tensors: Tensor) -> Batches:
    return Batches(*tensors, size=100)


@pytest.mark.parametrize(("length", "least", "most"), [(1e-6, 0.0, 1e-2), (1e-2, 0.3, 10.0)])
def test_darts(length: float, least: float, most: float) -> None:
    """Betty's differences are those of its default length in the second case, which is long for these cells."""
    peer, generator = program_of("darts"), torch.Generator().manual_seed(0)
    images, labels = torch.rand(48, 1, 14, 14, generator=generator), torch.arange(48) % 10
    data = peer.Clothes((images[:16], labels[:16]), (images[16:32], labels[16:32]), (images[32:], labels[32:]))
    program, levels = peer.nestor_program(data, 0, 4, 0.1, nestor.T1T2()), peer.betty_levels(data, 0, 4, 0.1)
    found, expected = first_moments(program, levels, "logits", 4, length)
    assert least <= relative(expected, found) < most
