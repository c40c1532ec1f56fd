"""Shared by the tests on real modules: hypergradients by hand, and a check that nothing changes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import nestor


def _evaluate(loss: Callable[..., Any], modules: Mapping[str, nn.Module], batch: Any) -> Tensor:
    """Call a loss by hand, with plain modules."""
    read = {name: modules[name] for name in inspect.signature(loss).parameters if name in modules}
    value = loss(*(() if batch is None else (batch,)), **read)
    loss_value: Tensor = value["loss"] if isinstance(value, Mapping) else value
    return loss_value


def _variables(module: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Select parameters by name; by default those that require a gradient."""
    named = dict(module.named_parameters())
    return {n: p for n, p in named.items() if (p.requires_grad if names is None else n in names)}


def _solve(gradient: Sequence[Tensor], theta: Sequence[Tensor], cotangent: Sequence[Tensor], damping: float) -> Any:
    """Solve ``(H + damping I) z = c`` by textbook conjugate gradients, to rounding."""
    sizes = [t.numel() for t in theta]

    def cut(vector: Tensor) -> list[Tensor]:
        return [part.view_as(t) for part, t in zip(vector.split(sizes), theta, strict=True)]

    def apply(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            gradient, theta, cut(vector), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([p.reshape(-1) for p in parts]) + damping * vector

    b = torch.cat([c.reshape(-1) for c in cotangent])
    z, r, p = torch.zeros_like(b), b, b
    for _ in range(400):
        product = apply(p)
        alpha = r @ r / (p @ product)
        z, new = z + alpha * p, r - alpha * product
        p, r = new + (new @ new) / (r @ r) * p, new
        if r.norm() <= 1e-13 * b.norm():
            break
    assert (b - apply(z)).norm() <= 1e-11 * b.norm(), "the oracle did not solve its system"
    return cut(z)


def _by_hand(
    modules: Mapping[str, nn.Module],
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    train: Any,
    valid: Any,
    *,
    lower: str = "net",
    upper: str = "weights",
    lower_names: Sequence[str] | None = None,
    upper_names: Sequence[str] | None = None,
    damping: float | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Differentiate by double backward through plain calls: ``direct - (d2G/dl dtheta) z``.

    ``z`` is the cotangent (T1-T2), or, with ``damping``, the solution of the damped system. Each loss is evaluated on
    copies of the modules after ``torch.manual_seed(seed)``.
    """
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        copies = copy.deepcopy(dict(modules))
        theta, lam = _variables(copies[lower], lower_names), _variables(copies[upper], upper_names)
        torch.manual_seed(seed)
        value = _evaluate(valid_loss, copies, valid)
        grads = torch.autograd.grad(value, [*theta.values(), *lam.values()], allow_unused=True, materialize_grads=True)
        cotangent, direct = grads[: len(theta)], grads[len(theta) :]

        copies = copy.deepcopy(dict(modules))
        theta, lam = _variables(copies[lower], lower_names), _variables(copies[upper], upper_names)
        torch.manual_seed(seed)
        gradient = torch.autograd.grad(
            _evaluate(train_loss, copies, train),
            list(theta.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        z = cotangent if damping is None else _solve(gradient, list(theta.values()), cotangent, damping)
        mixed = torch.autograd.grad(gradient, list(lam.values()), z, allow_unused=True, materialize_grads=True)
    return {name: d - m for name, d, m in zip(lam, direct, mixed, strict=True)}


def _relative_error(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Distance of two hypergradients over the length of the second, after checking that their names agree."""
    assert list(got) == list(wanted)
    assert all(got[name].shape == wanted[name].shape for name in wanted)
    a = torch.cat([got[name].detach().double().reshape(-1) for name in wanted])
    b = torch.cat([wanted[name].detach().double().reshape(-1) for name in wanted])
    assert b.norm() > 0, "the test compares with zero"
    return float((a - b).norm() / b.norm())


def _bits(value: Any) -> Any:
    """Turn tensors, however nested, into bytes."""
    if isinstance(value, Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: _bits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(part) for part in value]
    return value


def _state(program: nestor.Program) -> dict[str, Any]:
    """Record everything that a hypergradient must leave alone, writes of the same value included."""
    state: dict[str, Any] = {"generator": _bits(torch.get_rng_state()), "grad mode": torch.is_grad_enabled()}
    for level in program.levels.values():
        module, optimizer = level.problem.module, level.problem.optimizer
        for name, p in module.named_parameters():
            state[f"{level.name}.{name}"] = (_bits(p), id(p), p._version, p.requires_grad, p.is_leaf)
            grad = p.grad if p.is_leaf else None
            state[f"{level.name}.{name}.grad"] = (id(grad), None if grad is None else _bits(grad))
        for name, b in module.named_buffers():
            state[f"{level.name}.{name}"] = (_bits(b), id(b), b._version)
        for name, m in module.named_modules():
            state[f"{level.name}.{name} mode"] = m.training
            state[f"{level.name}.{name} attributes"] = sorted(vars(m))
        if optimizer is not None:
            state[f"{level.name} optimizer"] = _bits(optimizer.state_dict())
    return state


@contextmanager
def _untouched(program: nestor.Program) -> Iterator[None]:
    """Assert that the block leaves no trace on the program and on torch's generator."""
    before = _state(program)
    yield
    after = _state(program)
    assert after.keys() == before.keys()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed


@pytest.fixture(scope="session", autouse=True)
def _forward_mode_is_loaded() -> None:
    """Let torch load its forward-mode rules, which warns of a deprecation within torch, once a process."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def by_hand() -> Callable[..., dict[str, Tensor]]:
    """Hypergradient of a bilevel program by double backward; see ``_by_hand``."""
    return _by_hand


@pytest.fixture
def relative_error() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]:
    """Relative distance of two hypergradients."""
    return _relative_error


@pytest.fixture
def bits() -> Callable[[Any], Any]:
    """Bytes of tensors, for bitwise comparisons."""
    return _bits


@pytest.fixture
def untouched() -> Callable[[nestor.Program], AbstractContextManager[None]]:
    """Context in which the program must not change by a bit."""
    return _untouched
