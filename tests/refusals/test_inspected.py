"""What the first evaluation of a loss shows: a graph that hides parameters, second derivatives, changes in place."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import nestor
from nestor import (
    ForwardMode,
    Identity,
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


# Custom functions. The square of t: its backward has a second derivative only in the first.


class Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Once(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class WithoutGradients(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return 2 * g * ctx.saved_tensors[0]


class Outside(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(2 * g.detach().numpy() * ctx.saved_tensors[0].detach().numpy())


class Detached(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0].detach()


class OfTheOutput(Function):
    """An exponential saves its output; a rectifier saves what its derivative does not depend on smoothly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.where(x > 0, x.exp(), 0.0)
        ctx.save_for_backward(x > 0, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        positive, y = ctx.saved_tensors
        return torch.where(positive, g * y, 0.0)


class Rounded(Function):
    """A straight-through estimator, whose derivative within bounds is defined to be one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0].abs() < 2)


class InPlace(Square):
    """Overwrites what it has saved, as memory-saving kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return ctx.saved_tensors[0].mul_(2).mul_(g)


class Separate(Function):
    """The same with ``setup_context``, an integer output and a mapping rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x**2, x.sign().int()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class SeparateOnce(Separate):
    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            return 2 * g * ctx.saved_tensors[0]


class Kept(Function):
    """Keeps a tensor as an attribute, which has no graph in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.twice = 2 * x
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.twice


class Intermediate(Function):
    """Saves what its forward has computed beside its output: autograd knows no graph of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, 2 * x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[1]


class Fused(Function):
    """Computes its gradient in the forward, and scales it in place: a fused kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.gradients = {"of": [(2 * x).detach()]}
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.gradients["of"][0].mul_(g)


class Elsewhere(Function):
    """Keeps its gradient as an array outside of the context."""

    kept: ClassVar[dict[int, np.ndarray]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.number = len(Elsewhere.kept)
        Elsewhere.kept[ctx.number] = 2 * x.detach().numpy()
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(Elsewhere.kept[ctx.number])


class KeptConstant(Square):
    """Keeps constants, and a mask, which does not move smoothly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.two, ctx.mask = torch.full_like(x, 2.0), (x > 0.5).to(x)
        return x**2 * ctx.mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.two * g * ctx.saved_tensors[0] * ctx.mask


@torch.library.custom_op("nestor_tests::square", mutates_args=())
def operator(x: Tensor) -> Tensor:
    return x**2


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


operator.register_autograd(lambda ctx, g: (2 * g * ctx.saved_tensors[0]).detach(), setup_context=_save)


def first_of(function: type[Function]) -> Callable[[Tensor], Tensor]:
    return lambda x: function.apply(x)[0]


GOOD: dict[str, Callable[[Tensor], Tensor]] = {
    "Square": Square.apply,
    "Separate": first_of(Separate),
    "KeptConstant": KeptConstant.apply,
}
BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "Once": Once.apply,
    "WithoutGradients": WithoutGradients.apply,
    "Detached": Detached.apply,
    "Kept": Kept.apply,
    "Intermediate": Intermediate.apply,
    "Fused": Fused.apply,
    "Elsewhere": Elsewhere.apply,
    "Outside": Outside.apply,
    "SeparateOnce": first_of(SeparateOnce),
    "GeneratedBackward": operator,
}
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


@pytest.mark.parametrize("function", [OfTheOutput, Rounded])
def test_functions_whose_derivative_jumps(function: type[Function]) -> None:
    """Nothing is raised, and the result is that of autograd: y exp(x) at x = 1, and 1."""
    wanted = {OfTheOutput: -torch.e, Rounded: -1.0}[function]
    found = scalars(function.apply, "w t^2", nestor.T1T2()).hypergradient("w")["value"]
    torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=1e-12, atol=0)


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
