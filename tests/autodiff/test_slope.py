"""Reverse over forward: right for what it accepts, an error for everything else."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nestor.autodiff import dual_rules
from nestor.autodiff.forward_mode import dual, load_rules
from nestor.autodiff.slope import SEPARABLE, NotSeparableError, SlopeMode

Function = Callable[[Tensor, Tensor], Tensor]
INDEX = torch.tensor([[0], [3], [1]])


def positive(x: Tensor) -> Tensor:
    return x.square() + 0.3


def image(x: Tensor) -> Tensor:
    return x[None, None]


# Functions of one tensor, with the method and the function of torch where both exist.
ONE: dict[str, Callable[[Tensor], Any]] = {
    "neg": lambda a: (-a) + torch.neg(a) * a.neg(),
    "abs": lambda a: abs(a) * torch.abs(a) + a.abs(),
    "square": lambda a: a.square() + torch.square(a),
    "pow": lambda a: a.pow(3) + a**2 + torch.pow(positive(a), 1.5),
    "sqrt": lambda a: positive(a).sqrt() + torch.sqrt(positive(a)),
    "reciprocal": lambda a: positive(a).reciprocal() + torch.reciprocal(positive(a)) + 1 / positive(a),
    "rsqrt": lambda a: positive(a).rsqrt() + torch.rsqrt(positive(a)),
    "exp": lambda a: a.exp() * torch.exp(a),
    "log": lambda a: positive(a).log() * torch.log(positive(a)),
    "log1p": lambda a: positive(a).log1p() * torch.log1p(positive(a)),
    "sin": lambda a: a.sin() * torch.sin(a),
    "cos": lambda a: a.cos() * torch.cos(a),
    "erf": lambda a: a.erf() * torch.erf(a),
    "tanh": lambda a: a.tanh() * torch.tanh(a),
    "sigmoid": lambda a: a.sigmoid() * torch.sigmoid(a),
    "relu": lambda a: a.relu() + torch.relu(a) * F.relu(a),
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "gelu": lambda a: F.gelu(a) + F.gelu(a, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "clamp": lambda a: a.clamp(-0.5, 0.5) * torch.clamp(a, min=-1.0),
    "masked_fill": lambda a: a.masked_fill(a > 0.5, 0.0) * torch.masked_fill(a, a < 0.1, 1.0),
    "sum": lambda a: a.sum(0) * torch.sum(a, 0) + a.sum(),
    "mean": lambda a: a.mean(1) * torch.mean(a, 1) + a.mean(),
    "squeeze": lambda a: a[None].squeeze(0) * torch.squeeze(a[None]),
    "unsqueeze": lambda a: a.unsqueeze(0) * torch.unsqueeze(a, 0),
    "reshape": lambda a: a.reshape(-1) * torch.reshape(a, (-1,)) * a.view(12),
    "flatten": lambda a: a.flatten() * torch.flatten(a),
    "transpose": lambda a: a.t() * torch.t(a) * a.transpose(0, 1) * torch.transpose(a, 0, 1),
    "permute": lambda a: a.permute(1, 0) * torch.permute(a, (1, 0)),
    "expand": lambda a: a[None].expand(2, 3, 4) * a[None].expand_as(torch.zeros(2, 3, 4)),
    "clone": lambda a: a.clone() * torch.clone(a) * a.t().contiguous().t(),
    "to": lambda a: a.float().to(torch.float64),
    "getitem": lambda a: a[1:, ::2] * a[torch.tensor([0, 2])][:, :2],
    "narrow": lambda a: a.narrow(0, 1, 2) * torch.narrow(a, 0, 0, 2),
    "index_select": lambda a: a.index_select(0, INDEX[:1, 0]) * torch.index_select(a, 0, INDEX[2:, 0]),
    "gather": lambda a: a.gather(1, INDEX) * torch.gather(a, 1, INDEX),
    "stack": lambda a: torch.stack([a, a * a]),
    "cat": lambda a: torch.cat([a, a * a]),
    "split": lambda a: a.split(2, 1)[1] * torch.split(a, 2, 1)[0],
    "chunk": lambda a: a.chunk(2, 1)[1] * torch.chunk(a, 2, 1)[0],
    "unbind": lambda a: a.unbind(0)[1] * torch.unbind(a, 0)[0],
    "flip": lambda a: a.flip(0) * torch.flip(a, (1,)),
    "roll": lambda a: a.roll(1) * torch.roll(a, 2),
    "tril": lambda a: a.tril() * torch.tril(a) + a.triu() * torch.triu(a),
    "max_pool2d": lambda a: F.max_pool2d(image(a), 2),
    "avg_pool2d": lambda a: F.avg_pool2d(image(a), 2),
    "pad": lambda a: F.pad(a, (1, 1)),
}

# Functions of two tensors of shape (3, 4).
TWO: dict[str, Function] = {
    "add": lambda a, b: (a + b) * torch.add(a, b, alpha=2) * a.add(b),
    "radd": lambda a, b: Tensor.__radd__(a, b),
    "sub": lambda a, b: (a - b) * torch.sub(a, b) + a.sub(b) * Tensor.__rsub__(a, b),
    "mul": lambda a, b: a * b + torch.mul(a, b) * a.mul(b) + torch.multiply(a, b) * a.multiply(b),
    "mul of other shapes": lambda a, b: a * b[:1] * b.sum(),
    "rmul": lambda a, b: Tensor.__rmul__(a, b),
    "div": lambda a, b: a / positive(b) + torch.div(a, positive(b)) + a.div(positive(b)),
    "rdiv": lambda a, b: Tensor.__rtruediv__(positive(a), b),
    "power": lambda a, b: positive(a) ** b,
    "maximum": lambda a, b: torch.maximum(a, b) * a.maximum(b),
    "minimum": lambda a, b: torch.minimum(a, b) * a.minimum(b),
    "where": lambda a, b: torch.where(a > b, a, b) * a.where(b > 0, b),
    "stack": lambda a, b: torch.stack([a, b]),
    "cat": lambda a, b: torch.cat([a, b]),
    "dot": lambda a, b: torch.dot(a.flatten(), b.flatten()) * a.flatten().dot(b.flatten()),
    "outer": lambda a, b: torch.outer(a[0], b[0]) * a[1].outer(b[1]),
    "matmul": lambda a, b: a @ b.t() + torch.matmul(a, b.t()) * a.matmul(b.t()),
    "mm": lambda a, b: torch.mm(a, b.t()) * a.mm(b.t()),
    "bmm": lambda a, b: torch.bmm(a[None], b.t()[None]) * a[None].bmm(b.t()[None]),
    "linear": lambda a, b: F.linear(a, b) * F.linear(a, b, b[:, 0]) * F.linear(a, b, bias=a[0, :3]),
    "conv1d": lambda a, b: F.conv1d(a[None], b[:2, :3, None]) * F.conv1d(a[None], b[:2, :3, None], a[0, :2]),
    "conv2d": lambda a, b: F.conv2d(image(a), image(b)[:, :, :2, :2], padding=1),
    "mse_loss": lambda a, b: F.mse_loss(a, b) + F.mse_loss(a, b, reduction="none").sum(),
}

WAYS: dict[str, Callable[[Function], Function]] = {
    "theta, lambda": lambda f: f,
    "lambda, theta": lambda f: lambda a, b: f(b, a),
    "both, theta": lambda f: lambda a, b: f(a * b, a),
    "lambda, both": lambda f: lambda a, b: f(b, a * b),
    "both, both": lambda f: lambda a, b: f(a * b, a * b + b),
}


class Seen(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    theta, given, direction = torch.randn(3, 3, 4, dtype=torch.float64)
    return theta, given, direction


def scalar(function: Function, theta: Tensor, given: Tensor) -> Tensor:
    value = function(theta, given)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return (value * weights).sum()


def by_reverse(function: Function) -> Tensor:
    theta, given, direction = numbers()
    theta.requires_grad_()
    given.requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(function, theta, given), theta, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(given)
    (found,) = torch.autograd.grad(gradient, given, direction, allow_unused=True)
    return torch.zeros_like(given) if found is None else found


def by_slope(function: Function) -> Tensor:
    theta, given, direction = numbers()
    given.requires_grad_()
    load_rules()
    with forward_ad.dual_level():
        theta = dual(theta, direction)
        with SlopeMode() as mode:
            slope = mode.slope(scalar(function, theta, given))
        if slope is None:
            return torch.zeros_like(given)
        (found,) = torch.autograd.grad(slope, given, allow_unused=True)
    return torch.zeros_like(given) if found is None else found


def check(function: Function) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mse_loss warns of shapes
        torch.testing.assert_close(by_slope(function), by_reverse(function), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_tensor(name: str) -> None:
    function = ONE[name]
    check(lambda theta, given: function(theta * given))
    check(lambda theta, given: function(theta + given.square()))
    check(lambda theta, given: function(theta) * given.square().sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_tensors(name: str, way: str) -> None:
    check(WAYS[way](TWO[name]))


def test_every_separable_function_is_tested() -> None:
    theta, given, _ = numbers()
    with Seen() as seen:
        for function in ONE.values():
            function(theta)
        for pair in TWO.values():
            pair(theta, given)
    missing = SEPARABLE - seen.functions
    assert not missing, [getattr(function, "__name__", function) for function in missing]


NOT_SEPARABLE: dict[str, Function] = {
    "layer_norm": lambda a, b: F.layer_norm(a * b, (4,)),
    "layer_norm's weight": lambda a, b: F.layer_norm(a, (4,), b[0]),
    "batch_norm": lambda a, b: F.batch_norm(a * b, None, None, training=True),
    "log_softmax": lambda a, b: F.log_softmax(a * b, 1),
    "softmax": lambda a, b: (a * b).softmax(1),
    "logsumexp": lambda a, b: (a * b).logsumexp(1),
    "cross_entropy": lambda a, b: F.cross_entropy(a * b, torch.tensor([0, 1, 2])),
    "attention": lambda a, b: F.scaled_dot_product_attention((a * b)[None], a[None], a[None]),
    "atan2": torch.atan2,
    "solve": lambda a, b: torch.linalg.solve(a[:, :3] * b[:, :3] + 5 * torch.eye(3, dtype=a.dtype), a),
    "in place": lambda a, b: (a * 1.0).mul_(b),
    "item": lambda a, b: _with_item(a * 1.0, b),
    "item of a graph": lambda a, b: _with_item(b * 1.0, a),
    "item of both": lambda a, b: _with_item(a * b, a),
    "vmap": lambda a, b: torch.vmap(lambda x, y: torch.atan2(x, y))(a, b),
    "vmap, used": lambda a, b: torch.vmap(lambda x, y: (x * y).softmax(0))(a, b) * a,
    "custom": lambda a, b: _Product.apply(a, b),  # type: ignore[no-untyped-call]
    "custom, used": lambda a, b: _Product.apply(a, b) * b,  # type: ignore[no-untyped-call]
}


def _with_item(x: Tensor, y: Tensor) -> Tensor:
    x[0] = y[1]
    return x * x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return cotangent * y, cotangent * x

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None) -> Tensor:
        x, y = ctx.saved_tensors
        zero = torch.zeros_like(x)
        return (zero if dx is None else dx * y.detach()) + (
            zero if dy is None else dy * x
        )  # detached: not the derivative


@pytest.mark.parametrize("name", NOT_SEPARABLE)
def test_everything_else_is_refused(name: str) -> None:
    with pytest.raises((NotSeparableError, RuntimeError)):  # some operations have no rule inside vmap
        by_slope(NOT_SEPARABLE[name])


def test_upstream_of_the_inputs_everything_is_allowed() -> None:
    def loss(theta: Tensor, given: Tensor) -> Tensor:
        hidden = F.layer_norm(theta, (4,)).softmax(1)
        return hidden * F.softmax(given, 1).log()

    check(loss)


def test_detach_and_no_grad_are_respected() -> None:
    def loss(theta: Tensor, given: Tensor) -> Tensor:
        with torch.no_grad():
            factor = (theta * given).sum()
        return theta.square() * given.exp() * factor + (theta.detach() * given) * theta

    check(loss)


def test_a_value_without_inputs_has_no_slope() -> None:
    assert not by_slope(lambda theta, given: theta.square()).any()
    assert not by_slope(lambda theta, given: given.square()).any()


NORMALIZED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor]]] = {
    # shape of the input, shape of weight and bias
    "layer": ((2, 3, 4), (4,), lambda x, *ab: F.layer_norm(x, (4,), *ab, 1e-3)),
    "layer, two dimensions": ((2, 3, 4), (3, 4), lambda x, *ab: F.layer_norm(x, (3, 4), *ab, 1e-3)),
    "batch of rows": ((5, 3), (3,), lambda x, *ab: F.batch_norm(x, None, None, *ab, True, 0.1, 1e-3)),
    "batch of images": ((5, 3, 2, 4), (3,), lambda x, *ab: F.batch_norm(x, *running(), *ab, True, momentum=0.2)),
    "batch of one": ((1, 3, 2, 4), (3,), lambda x, *ab: F.batch_norm(x, *running(), *ab, True)),
    "groups of rows": ((5, 6), (6,), lambda x, *ab: F.group_norm(x, 2, *ab, 1e-3)),
    "groups of images": ((5, 6, 2, 4), (6,), lambda x, *ab: F.group_norm(x, 3, *ab)),
    "groups of one": ((5, 3), (3,), lambda x, *ab: F.group_norm(x, 3, *ab)),
    "groups, transposed": ((4, 5, 6), (6,), lambda x, *ab: F.group_norm(x.transpose(1, 2), 3, *ab)),
    "no weight": ((5, 3, 2, 4), (3,), lambda x, *ab: F.batch_norm(x, None, None, None, None, True, 0.1, 1e-3)),
    "no weight, groups": ((5, 6, 2, 4), (6,), lambda x, *ab: F.group_norm(x, 2, None, None, 1e-3)),
}


def running() -> tuple[Tensor, Tensor]:
    return torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("moving", [(True, True, True), (True, False, False), (False, True, True)])
def test_normalizations_are_written_out(name: str, moving: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    calls: list[str] = []
    for kind in ("layer_norm", "batch_norm", "group_norm"):
        written = vars(dual_rules)[kind]
        monkeypatch.setattr(dual_rules, kind, lambda *a, written=written, kind=kind: calls.append(kind) or written(*a))
    load_rules()
    of_input, of_weight, function = NORMALIZED[name]
    values = [3 + torch.randn(of_input, dtype=torch.float64), *torch.randn(2, *of_weight, dtype=torch.float64)]
    changes = [torch.randn_like(v) * moves for v, moves in zip(values, moving, strict=True)]
    value, expected = torch.autograd.functional.jvp(function, tuple(values), tuple(changes))
    with forward_ad.dual_level():
        given = [dual(v, c) if moves else v for v, c, moves in zip(values, changes, moving, strict=True)]
        with SlopeMode():
            found = function(*given)
        assert torch.equal(forward_ad.unpack_dual(found).primal, value)
        tangent = forward_ad.unpack_dual(found).tangent
        assert tangent is not None or not expected.any()
        torch.testing.assert_close(
            torch.zeros_like(value) if tangent is None else tangent, expected, rtol=1e-11, atol=1e-12
        )


def test_running_statistics_move_as_usual() -> None:
    """Once, by the values."""
    torch.manual_seed(0)
    x, change = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found, expected = running(), running()
    F.batch_norm(x, *expected, None, None, True, 0.3)
    with forward_ad.dual_level(), SlopeMode():
        F.batch_norm(dual(x, change), *found, None, None, True, 0.3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_what_torch_refuses_is_refused() -> None:
    """One value for each channel has no scale: the error is torch's."""

    def function(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    x = torch.randn(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value") as usual:
        function(x)
    with pytest.raises(ValueError, match="more than 1 value") as found, forward_ad.dual_level(), SlopeMode():
        function(dual(x, torch.ones_like(x)))
    assert str(found.value) == str(usual.value)


def attention(x: Tensor, **options: Any) -> Tensor:
    query, key, value = x.chunk(3, -1)
    return F.scaled_dot_product_attention(query, key[..., :4, :], value[..., :4, :], **options)


_LOWER = torch.tensor([[0.0, -1.0, 2.0, -math.inf], *[[-math.inf] * 4] * 4], dtype=torch.float64)
ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": attention,
    "scaled": lambda x: attention(x, scale=0.3),
    "causal": lambda x: attention(x, is_causal=True),
    "masked": lambda x: attention(x, attn_mask=torch.tensor([True, False, True, True])),
    "a row that is masked": lambda x: attention(x, attn_mask=torch.eye(5, 4, dtype=torch.bool)),
    "added": lambda x: attention(x, attn_mask=_LOWER),
    "and views of it": lambda x: attention(x).transpose(0, 1).reshape(2, 15, 2)[:, 1:].mT,
    "one head": lambda x: attention(x[:1, :1]).squeeze(0).transpose(0, 1).reshape(5, 2),
    "not dual": lambda x: F.scaled_dot_product_attention(x, x.detach(), 2 * x),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_written_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    calls: list[int] = []
    written = dual_rules.attend
    monkeypatch.setattr(dual_rules, "attend", lambda *a: calls.append(0) or written(*a))
    x, change = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64)
    check_forward(ATTENTIONS[name], x, change)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes parts of these layers in single precision."""
    for kind in ("layer_norm", "batch_norm", "group_norm", "attend"):
        monkeypatch.setattr(dual_rules, kind, None)
    x = torch.randn(4, 6, dtype=dtype)
    one = torch.ones(6, dtype=dtype)
    functions = (
        lambda x: F.layer_norm(x, (6,), one, one),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.group_norm(x, 2),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    )
    load_rules()
    for function in functions:
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), SlopeMode():
            assert function(dual(x, torch.ones_like(x))).dtype == dtype


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_multi_head_attention_is_written_out(
    options: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch computes it, with tangents of inputs and parameters; masks are torch's."""
    torch.manual_seed(0)
    calls: list[int] = []
    written = dual_rules.attend
    monkeypatch.setattr(dual_rules, "attend", lambda *a: calls.append(0) or written(*a))
    layer = nn.MultiheadAttention(6, 2, **options, dtype=torch.float64)
    layer.train("dropout" not in options)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    numbers = torch.cat(
        [torch.randn(5 * 3 * 6, dtype=torch.float64), *(0.3 * torch.randn(p.numel()) for p in parameters)]
    )
    mask = (
        torch.ones(5 if not options.get("batch_first") else 3, 5 if not options.get("batch_first") else 3).tril() == 0
    )

    def function(all_numbers: Tensor) -> Tensor:
        flat, *rest = all_numbers.split([90, *(p.numel() for p in parameters)])
        held = {name: part.view_as(p) for name, part, p in zip(names, rest, parameters, strict=True)}
        x = flat.view(5, 3, 6)
        arguments = {"need_weights": False, **({"attn_mask": mask} if masked else {})}
        return torch.func.functional_call(layer, held, (x, x, x), arguments)[0]

    check_forward(function, numbers, torch.randn_like(numbers))
    assert len(calls) == (0 if masked else 1)


def check_forward(function: Callable[[Tensor], Tensor], x: Tensor, change: Tensor) -> None:
    """Compare value and tangent with reverse mode."""
    load_rules()
    with sdpa_kernel(SDPBackend.MATH):  # torch's fast kernels have no second derivatives
        value, expected = torch.autograd.functional.jvp(function, x, change)
        with forward_ad.dual_level():
            with SlopeMode():
                found = function(dual(x, change))
            found = forward_ad.unpack_dual(found)
            torch.testing.assert_close(found.primal, value, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(found.tangent, expected, rtol=1e-11, atol=1e-12)
