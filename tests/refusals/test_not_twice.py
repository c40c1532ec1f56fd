"""Losses that torch cannot differentiate twice, or whose gradient is no derivative: what the first evaluation shows."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_squares import (
    BAD,
    GOOD,
    InPlace,
    Intermediate,
    KeptConstant,
    OfTheOutput,
    Once,
    Rounded,
    Separate,
    Square,
    first_of,
)
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import SGD

import nestor
from nestor import ForwardMode, Identity, Implicit, Problem, Program, Response, UnsupportedError, Variable

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def by_hand(program: Program) -> None:
    program.hypergradient("w")


def in_a_run(program: Program) -> None:
    nestor.Engine(program, seed=0).run(1)


LOSSES: dict[str, tuple[Callable[[Any], Callable[..., Tensor]], float]] = {
    "w t^2": (lambda square: lambda t, w: (square(t()) * w()).sum(), -2.0),
    "(w t)^2": (lambda square: lambda t, w: square(t() * w()).sum(), -4.0),
}
TWICE = [
    nestor.T1T2(),
    Implicit(solver=nestor.DenseSolve(), damping=1.0),
    nestor.Unrolled(),
    nestor.Unrolled(checkpoint="none"),
]
FORWARD = Implicit(solver=Identity(), cross=ForwardMode())
ONCE = [nestor.FiniteDifference(), nestor.SAMA(), nestor.FiniteDifference(reuse=True)]


def scalars(square: Callable[[Tensor], Tensor], loss: str, response: Response) -> Program:
    t, w = (Variable(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    return Program(
        t=Problem(t, LOSSES[loss][0](square), response=response, optimizer=SGD(t.parameters(), lr=1.0)),
        w=Problem(w, lambda t: t().sum(), optimizer=SGD(w.parameters(), lr=1.0)),
    )


@pytest.mark.parametrize("run", [by_hand, in_a_run])
@pytest.mark.parametrize("response", TWICE, ids=lambda r: r.describe())
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", BAD)
def test_functions_without_a_second_derivative(
    function: str, loss: str, response: Response, run: Callable[[Program], None]
) -> None:
    with pytest.raises(UnsupportedError, match=rf"level 't', loss .*{function}\w* is not differentiable") as caught:
        run(scalars(BAD[function], loss, response))
    assert "FiniteDifference()" in str(caught.value)


@pytest.mark.parametrize("response", ONCE, ids=lambda r: r.describe())
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", [*BAD, *GOOD, "InPlace"])
def test_first_derivatives_of_any_function(function: str, loss: str, response: Response) -> None:
    """The response that the error names is right, for every function."""
    square = {**BAD, **GOOD, "InPlace": InPlace.apply}[function]
    found = scalars(square, loss, response).hypergradient("w")["value"]
    torch.testing.assert_close(found, torch.full_like(found, LOSSES[loss][1]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("response", TWICE[:3], ids=lambda r: r.describe())
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", GOOD)
def test_functions_with_a_second_derivative(function: str, loss: str, response: Response) -> None:
    """As with torch's own square."""
    found = scalars(GOOD[function], loss, response).hypergradient("w")["value"]
    wanted = scalars(torch.square, loss, response).hypergradient("w")["value"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"batch_chunk_size": 2, "allow_retain_graph": True}])
def test_a_fused_loss_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The chunked loss of a linear layer has its gradient of the forward; the inspection does not change it."""
    chunks = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions(**options)
    torch.manual_seed(0)
    x, words = torch.randn(6, 4, dtype=dtype), torch.arange(6)

    def program(response: Response, options: Any) -> Program:
        torch.manual_seed(1)
        net, w = nn.Linear(4, 7, dtype=dtype), Variable(torch.zeros(4, dtype=dtype))

        def loss(net: nn.Module, w: nn.Module) -> Tensor:
            return 3 * nn.functional.linear_cross_entropy(x * w().exp(), net.weight, words, options=options)

        return Program(
            net=Problem(net, loss, response=response, optimizer=SGD(net.parameters(), 0.1)),
            w=Problem(w, lambda net: net(x).square().mean(), optimizer=SGD(w.parameters(), 0.1)),
        )

    with pytest.raises(UnsupportedError, match="linear_cross_entropy_batch_chunked"):
        nestor.Engine(program(nestor.T1T2(), chunks), seed=0).run(1)
    found, wanted = program(nestor.FiniteDifference(), chunks), program(nestor.FiniteDifference(), None)
    for each in (found, wanted):
        nestor.Engine(each, seed=0).run(2)
    rtol = 1e-9 if dtype == torch.float64 else 1e-3
    for name in ("net", "w"):
        for ours, theirs in zip(found.levels[name].parameters, wanted.levels[name].parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-2 * rtol)


def test_a_run_in_forward_mode() -> None:
    """The level's own step has inspected the loss, so forward mode raises the error before it evaluates."""
    with pytest.raises(UnsupportedError, match=r"level 't', loss .*Once is not differentiable"):
        nestor.Engine(scalars(Once.apply, "w t^2", FORWARD), seed=0).run(1)


def test_a_function_whose_derivative_jumps() -> None:
    """Nothing is raised, and the result is that of autograd: y exp(x) at x = 1."""
    found = scalars(OfTheOutput.apply, "w t^2", nestor.T1T2()).hypergradient("w")["value"]
    torch.testing.assert_close(found, torch.full_like(found, -torch.e), rtol=1e-12, atol=0)


class Reversed(Function):
    """A reversed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def hooked(x: Tensor) -> Tensor:
    y = x.clone()
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return y


def seen(x: Tensor) -> Tensor:
    """A hook that changes nothing."""
    y = x.clone()
    if y.requires_grad:
        y.register_hook(lambda g: None)
    return y**2


@pytest.mark.parametrize("run", [by_hand, in_a_run])
@pytest.mark.parametrize("surrogate", [Rounded.apply, Reversed.apply, hooked], ids=["rounded", "reversed", "hooked"])
def test_a_gradient_that_is_no_derivative(surrogate: Any, run: Callable[[Program], None]) -> None:
    """The run says that the hypergradient is that of another loss."""
    with pytest.warns(
        nestor.NestorWarning, match=r"Level 't', loss .*: the gradient of the loss is not its derivative"
    ):
        run(scalars(lambda x: surrogate(x) ** 2 + x, "w t^2", nestor.T1T2(cross=nestor.ReverseMode())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [Square.apply, KeptConstant.apply, OfTheOutput.apply, seen])
def test_a_gradient_that_is_a_derivative(function: Any, dtype: torch.dtype) -> None:
    """No warning; at large and small values, in both precisions, and where the loss is noise."""
    for scale in (1e-3, 1.0, 30.0):
        net, w = nn.Linear(3, 2, dtype=dtype), Variable(torch.zeros(2, dtype=dtype))

        def loss(net: nn.Linear, w: nn.Module, scale: float = scale) -> Tensor:
            return (function(net(scale * X.to(net.weight.dtype))) * w().exp()).mean()

        program = Program(
            net=Problem(net, loss, optimizer=SGD(net.parameters(), 1e-4)),
            w=Problem(w, lambda net: net(X.to(net.weight.dtype)).square().mean()),
        )
        program.hypergradient("w")


SPARSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sparse_coo_tensor": lambda index, values: torch.sparse_coo_tensor(index, values, (3, 3)),
    "to_sparse": lambda index, values: (
        torch.zeros(3, 3, dtype=values.dtype).index_put(tuple(index), values).to_sparse()
    ),
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("learned", [True, False])
def test_sparse_tensors(kind: str, *, learned: bool) -> None:
    """Second derivatives in their values are wrong in torch; constant ones are right."""
    index = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    torch.manual_seed(0)
    net, w = nn.Linear(4, 1, bias=False, dtype=torch.float64), Variable(torch.ones(3, dtype=torch.float64))
    dense = torch.randn(3, 3, dtype=torch.float64)

    def loss(matrix: Callable[[Tensor], Tensor], net: nn.Linear, w: nn.Module) -> Tensor:
        values = net.weight[0]
        product = matrix(values if learned else values.detach()) @ (dense * w() + (0 if learned else values[:3]))
        return product.tanh().square().sum()

    def program(matrix: Callable[[Tensor], Tensor], response: Response) -> Program:
        def of(net: nn.Linear, w: nn.Module) -> Tensor:
            return loss(matrix, net, w)

        return Program(
            net=Problem(net, of, response=response),
            w=Problem(w, lambda net: net.weight.square().sum()),
        )

    def in_full(values: Tensor) -> Tensor:
        return torch.zeros(3, 3, dtype=values.dtype).index_put(tuple(index), values)

    wanted = program(in_full, nestor.T1T2()).hypergradient("w")["value"]
    chosen = program(lambda values: SPARSE[kind](index, values), nestor.T1T2())
    if learned:
        with pytest.raises(UnsupportedError, match="sparse tensor that requires a gradient"):
            chosen.hypergradient("w")
        chosen = program(lambda values: SPARSE[kind](index, values), nestor.FiniteDifference())
    torch.testing.assert_close(chosen.hypergradient("w")["value"], wanted, rtol=1e-3 if learned else 1e-10, atol=1e-9)


def test_samples_of_a_dirichlet_distribution() -> None:
    """A function of torch in Python, marked once_differentiable."""
    net, w = nn.Linear(3, 4, dtype=torch.float64), Variable(torch.zeros(3, dtype=torch.float64))

    def loss(net: nn.Linear, w: nn.Module) -> Tensor:
        concentration = nn.functional.softplus(net(X * w().exp())) + 0.5
        return torch.distributions.Dirichlet(concentration).rsample().square().sum()

    program = Program(net=Problem(net, loss), w=Problem(w, lambda net: net(X).square().sum()))
    with pytest.raises(UnsupportedError, match="_Dirichlet is not differentiable"):
        program.hypergradient("w")


class SeparateIntermediate(Separate):
    """It has a mapping rule, and saves an intermediate result."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward((2 * inputs[0]).detach())

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


def with_tasks(square: Callable[[Tensor], Tensor], response: Response, **options: Any) -> Program:
    t, w = (Variable(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    return Program(
        t=Problem(
            t,
            lambda t, w: (square(t() * w()) + t()).sum(),
            response=response,
            optimizer=SGD(t.parameters(), lr=0.1),
            tasks=3,
            **options,
        ),
        w=Problem(w, lambda t: t().sum(), optimizer=SGD(w.parameters(), lr=0.1)),
    )


@pytest.mark.parametrize("function", [*GOOD, "SeparateOnce"])
def test_an_objective_with_tasks_may_be_differentiated_once(function: str) -> None:
    square = {**GOOD, **BAD}[function]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)  # some functions cannot be mapped
        value = with_tasks(square, nestor.T1T2()).objective("t")
    assert value.item() == (6.0 + 6.0 if function != "KeptConstant" else 12.0)


@pytest.mark.parametrize("run", [by_hand, in_a_run])
@pytest.mark.parametrize("options", [{}, {"vectorize": False}], ids=["as found", "in turn"])
@pytest.mark.parametrize("function", [*(name for name in BAD if name != "Separate"), "SeparateIntermediate"])
def test_functions_without_a_second_derivative_in_tasks(
    function: str, options: dict[str, Any], run: Callable[[Program], None]
) -> None:
    """Mapped or not: one task is evaluated alone, and inspected."""
    square = {**BAD, "SeparateIntermediate": first_of(SeparateIntermediate)}[function]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)
        with pytest.raises(UnsupportedError, match=rf"level 't', loss .*{function}\w* is not differentiable"):
            run(with_tasks(square, nestor.T1T2(), **options))


@pytest.mark.parametrize("options", [{}, {"vectorize": False}], ids=["as found", "in turn"])
@pytest.mark.parametrize("function", GOOD)
def test_functions_with_a_second_derivative_in_tasks(function: str, options: dict[str, Any]) -> None:
    """As with torch's own square; the random numbers and the buffers of a run are those without the inspection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nestor.NestorWarning)
        found = with_tasks(GOOD[function], nestor.T1T2(), **options).hypergradient("w")["value"]
    wanted = with_tasks(torch.square, nestor.T1T2(), **options).hypergradient("w")["value"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", BAD)
def test_best_responses_without_a_second_derivative(function: str) -> None:
    """In the backward pass; finite differences need no second derivative."""

    def derivative(square: Callable[[Tensor], Tensor], response: Response) -> Tensor:
        t, w = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64, requires_grad=True)
        best = nestor.best_response(lambda t, w: square(t * w).sum(), t, w, response)
        return torch.autograd.grad(best.sum(), w)[0]

    for response in (nestor.T1T2(), Implicit(solver=nestor.DenseSolve())):
        with pytest.raises(UnsupportedError, match=rf"best_response: .*{function}\w* is not differentiable"):
            derivative(BAD[function], response)
    found = derivative(BAD[function], nestor.FiniteDifference())
    torch.testing.assert_close(found, derivative(torch.square, nestor.T1T2()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", GOOD)
def test_best_responses_with_a_second_derivative(function: str) -> None:
    t, w = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64, requires_grad=True)
    best = nestor.best_response(lambda t, w: GOOD[function](t * w).sum(), t, w, Implicit(solver=nestor.DenseSolve()))
    assert torch.autograd.grad(best.sum(), w)[0].tolist() == [-2.0, -2.0]


class Layers(nn.Module):
    """Many functions of one class, all but the first of them with a branch: graphs are searched in one order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(Intermediate.apply(layer(x))) * torch.sigmoid(Intermediate.apply(x))
        return x.square().mean()


@pytest.mark.parametrize("attempt", range(5))
def test_functions_in_every_layer(attempt: int) -> None:
    net, w = Layers(), Variable(torch.ones(3, dtype=torch.float64))
    program = Program(
        net=Problem(net, lambda net, w: net(X * w()), optimizer=SGD(net.parameters(), 0.1)),
        w=Problem(w, lambda net: net(X), optimizer=SGD(w.parameters(), 0.1)),
    )
    with pytest.raises(UnsupportedError, match="Intermediate is not differentiable"):
        nestor.Engine(program, seed=0).run(1)


def test_compiled_code_inside_a_loss() -> None:
    """A function that the loss calls cannot be seen in the declaration, but in the graph."""
    square = torch.compile(lambda x: x**2, backend="aot_eager")
    for response in TWICE[:1]:
        with pytest.raises(UnsupportedError, match=r"level 't'.*torch.compile has compiled.*compile=True"):
            scalars(square, "w t^2", response).hypergradient("w")
    with pytest.raises(UnsupportedError, match=r"level 't'.*torch.compile has compiled"):
        nestor.Engine(scalars(square, "w t^2", FORWARD), seed=0).run(1)
    found = scalars(square, "w t^2", nestor.FiniteDifference()).hypergradient("w")["value"]
    torch.testing.assert_close(found, torch.full_like(found, -2.0), rtol=1e-3, atol=0)


def test_gauss_newton_and_other_products() -> None:
    """A matrix whose products go through the function twice, though the mixed derivative does not need it."""

    def loss(t: Variable, w: Variable) -> Tensor:
        return (nestor.outputs(Once.apply(t())) - w()).square().sum()

    t, w = (Variable(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    response = Implicit(condition=nestor.Stationarity(curvature=nestor.GaussNewton()), damping=1.0)
    program = Program(t=Problem(t, loss, response=response), w=Problem(w, lambda t: t().sum()))
    with pytest.raises(UnsupportedError, match="Once is not differentiable"):
        program.hypergradient("w")


def test_an_objective_may_be_differentiated_once() -> None:
    """``Program.objective`` raises nothing for a function without a second derivative."""
    program = scalars(Once.apply, "w t^2", nestor.FiniteDifference())
    (found,) = torch.autograd.grad(program.objective("t"), list(program.levels["t"].parameters))
    assert found.tolist() == [2.0, 2.0]
