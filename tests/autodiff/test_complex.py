"""Complex tensors: the same derivatives as the problem in real and imaginary parts, or a refusal."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

import nestor
from nestor.optim import functional_step

SOLVERS: list[Any] = [
    None,
    nestor.GMRES(rtol=1e-12, max_steps=60),
    nestor.DenseSolve(),
    nestor.BiCGSTAB(rtol=1e-12, max_steps=200),
    nestor.NormalConjugateGradient(rtol=1e-12, max_steps=200),
]
SYMMETRIC: list[Any] = [
    nestor.ConjugateGradient(rtol=1e-12, max_steps=60),
    nestor.MINRES(rtol=1e-12, max_steps=60),
    nestor.DenseSolve(),
    nestor.GMRES(rtol=1e-12, max_steps=60),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.complex128)


MATRIX = numbers(3, 3) + 4 * torch.eye(3)


def residual(z: Tensor, a: Tensor) -> Tensor:
    """Not holomorphic, in either argument."""
    return MATRIX @ z + 0.3 * z.conj() * z.real - a * a.conj().roll(1) - a


def solved(a: Tensor) -> Tensor:
    """A root by fixed-point iteration."""
    z = torch.zeros_like(a)
    for _ in range(200):
        z = torch.linalg.solve(MATRIX, a * a.conj().roll(1) + a - 0.3 * z.conj() * z.real)
    return z


def objective(z: Tensor) -> Tensor:
    return (z.real * torch.tensor([1.0, 2.0, -1.0]) + z.imag**2).sum()


def differences(function: Any, point: Tensor) -> Tensor:
    """The gradient as torch defines it, d/dRe + i d/dIm, by central differences."""
    found = torch.zeros_like(point)
    for entry in range(len(point)):
        for unit in (1, 1j):
            shift = torch.zeros_like(point)
            shift[entry] = 1e-5 * unit
            found[entry] += unit * (function(point + shift) - function(point - shift)) / 2e-5
    return found


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("fixed", [False, True])
def test_root(solver: Any, fixed: bool) -> None:
    """The default solver and the others; as a root and as a fixed point."""
    a = numbers(3, seed=1)
    expected = differences(lambda at: objective(solved(at)), a)
    leaf = a.clone().requires_grad_()
    if fixed:
        z = nestor.fixed_point(lambda z, a: z - 0.1 * residual(z, a), solved(a), leaf, solver)
    else:
        z = nestor.root(residual, solved(a), leaf, solver)
    assert torch.equal(z.detach(), solved(a))
    (got,) = torch.autograd.grad(objective(z), leaf)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SYMMETRIC, ids=lambda solver: type(solver).__name__)
def test_best_response(solver: Any) -> None:
    """A mixed structure: one complex and one real variable, conjugated inputs."""
    weight = numbers(3, seed=2)
    real = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def loss(theta: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
        w, r = inputs
        z, x = theta["z"], theta["x"]
        return (z - w.conj()).abs().square().sum() + (z.real * x).sum() + (x - r).square().sum() + 0.5 * z.imag @ z.imag

    def minimiser(w: Tensor, r: Tensor) -> dict[str, Tensor]:
        # Re z: 2 (Re z - Re w) + x = 0 and Re z + 2 (x - r) = 0; Im z: 2 (Im z + Im w) + Im z = 0.
        x = (2 * r - w.real) * 2 / 3
        return {"z": torch.complex(w.real - x / 2, -2 * w.imag / 3), "x": x}

    leaf, given = weight.clone().requires_grad_(), real.clone().requires_grad_()
    theta = {key: value.detach() for key, value in minimiser(weight, real).items()}
    answer = nestor.best_response(loss, theta, [leaf.conj().conj(), given], nestor.Implicit(solver=solver))
    truth = minimiser(leaf, given)
    for of in (answer, truth):
        of["value"] = objective(of["z"]) + of["x"].square().sum()
    got = torch.autograd.grad(answer["value"], [leaf, given])
    expected = torch.autograd.grad(truth["value"], [leaf, given])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_second_derivative() -> None:
    """Differentiable again."""
    a = numbers(2, seed=3)

    def slope(at: Tensor) -> Tensor:
        leaf = at if at.requires_grad else at.clone().requires_grad_()
        z = nestor.root(lambda z, a: a * z - 1, (1 / leaf).detach(), leaf, nestor.DenseSolve())
        (first,) = torch.autograd.grad((z.real**2).sum(), leaf, create_graph=True)
        return first.imag.sum()

    leaf = a.clone().requires_grad_()
    (got,) = torch.autograd.grad(slope(leaf), leaf)
    torch.testing.assert_close(got, differences(lambda at: slope(at).detach(), a), rtol=1e-6, atol=1e-8)


def test_smoothed() -> None:
    """The estimate is the one of real and imaginary parts."""
    point = numbers(2, seed=4)

    def of(z: Tensor) -> Tensor:
        return (z.real * 3 - z.imag).sum()

    leaf, parts = point.clone().requires_grad_(), torch.view_as_real(point).clone().requires_grad_()
    torch.manual_seed(0)
    (got,) = torch.autograd.grad(nestor.smoothed(of, leaf), leaf)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(nestor.smoothed(lambda p: of(torch.view_as_complex(p)), parts), parts)
    torch.testing.assert_close(torch.view_as_real(got), expected)


OPTIMIZERS: list[Any] = [
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (Adam, {"lr": 0.1, "amsgrad": True}),
    (AdamW, {"lr": 0.1}),
    (RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.5}),
    (Adagrad, {"lr": 0.1}),
    (Adadelta, {"lr": 0.5}),
    (NAdam, {"lr": 0.1}),
    (RAdam, {"lr": 0.1, "betas": (0.5, 0.5)}),
    (Adamax, {"lr": 0.1}),
    (ASGD, {"lr": 0.1}),
    (Rprop, {"lr": 0.1}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_functional_steps(kind: Any, options: dict[str, Any]) -> None:
    """Those of torch, and of the same problem in real and imaginary parts; so is the derivative."""
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return (z.abs() ** 4).sum() * weight + (z - 1j).real.square().sum()

    def run(start: Tensor, of: Any) -> Tensor:
        optimizer = kind([start.clone().requires_grad_()], **options)
        params, state = [start.clone().requires_grad_()], None
        for _ in range(4):
            grads = torch.autograd.grad(of(params[0]), params, create_graph=True)
            params, state = functional_step(optimizer, params, grads, state)
        return params[0]

    whole = run(numbers(3, seed=5), loss)
    parts = run(torch.view_as_real(numbers(3, seed=5)), lambda p: loss(torch.view_as_complex(p)))
    torch.testing.assert_close(torch.view_as_real(whole), parts, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(objective(whole), weight),
        torch.autograd.grad(objective(torch.view_as_complex(parts)), weight),
        rtol=1e-6,
        atol=1e-9,
    )
    real = numbers(3, seed=5).requires_grad_()
    optimizer = kind([real], **options)
    for _ in range(4):
        optimizer.zero_grad()
        loss(real).backward()
        optimizer.step()
    torch.testing.assert_close(whole.detach(), real.detach(), rtol=1e-6, atol=1e-9)


def test_complex_variables_of_a_program_are_refused() -> None:
    """Lower and upper ones, with the remedy."""
    net, w = nn.Linear(2, 1), nn.Linear(2, 1, dtype=torch.complex128)

    def lower(net: Any, w: Any) -> Tensor:
        return net.weight.square().sum() + w.weight.abs().sum()

    with pytest.raises(nestor.UnsupportedError, match=r"level 'w'.*'weight' is complex.*view_as_real.*view_as_complex"):
        nestor.Program(net=nestor.Problem(net, lower), w=nestor.Problem(w, lambda net: net.weight.sum()))
    with pytest.raises(TypeError, match="view_as_real"):
        nestor.Variable(numbers(2))
    optimizer = SGD([numbers(2).requires_grad_()], lr=0.1)
    with pytest.raises(nestor.UnsupportedError, match="theta is complex"):
        nestor.best_response(
            lambda z, a: (z - a).abs().sum(), numbers(2), numbers(2).requires_grad_(), optimizer=optimizer
        )


def test_complex_numbers_between_real_variables() -> None:
    """The remedy: real parameters, complex in between."""
    theta = nestor.Variable(torch.view_as_real(numbers(3, seed=6)).clone())
    w = nestor.Variable(torch.tensor(0.3, dtype=torch.float64))

    def lower(theta: Any, w: Any) -> Tensor:
        z = torch.view_as_complex(theta())
        return (torch.fft.fft(z) - w() * (1 + 2j)).abs().square().sum()

    program = nestor.Program(
        theta=nestor.Problem(theta, lower, response=nestor.Implicit()),
        w=nestor.Problem(w, lambda theta: theta().square().sum() + 3 * theta()[0, 1]),
    )
    with torch.no_grad():
        theta.value.copy_(torch.view_as_real(torch.fft.ifft(0.3 * (1 + 2j) * torch.ones(3).to(torch.complex128))))
    # theta* = w (1 + 2i) in the first entry: F = 5 w^2 + 6 w.
    got = program.hypergradient("w", {})["value"]
    torch.testing.assert_close(got, torch.tensor(10 * 0.3 + 6, dtype=torch.float64))
