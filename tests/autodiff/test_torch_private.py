"""Private functions of torch and their public fallbacks give the same results, one by one and in whole programs."""

import os
import subprocess
import sys
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import nestor
from nestor.autodiff import torch_checks, torch_features, torch_public
from nestor.autodiff.forward_mode import DualMode, dual, primal, tangent
from nestor.autodiff.torch_private import FEATURES

if __name__ == "__main__":  # in the process where every fallback is bound
    assert torch_features.PUBLIC_ONLY
else:
    pytestmark = pytest.mark.skipif(torch_features.PUBLIC_ONLY, reason="there is nothing to compare the fallbacks with")

BY_PURPOSE = {feature.purpose: feature for feature in FEATURES}


def both(purpose: str) -> tuple[Any, Any]:
    """The private function of a feature, or the functions, and the fallback."""
    feature = BY_PURPOSE[purpose]
    assert feature.private is not None, "this version of torch lacks it, or it fails its self-check"
    return feature.private, feature.public


def test_all_are_bound() -> None:
    """With the torch that nestor is developed with, no feature falls back."""
    assert [feature.purpose for feature in FEATURES if feature.private is None] == []


def test_a_failing_self_check_binds_the_fallback() -> None:
    """A name that is missing, a call that raises and a wrong result; the good one is kept."""
    fallback = object()

    def choose(load: Callable[[], Any], works: Callable[[Any], bool]) -> Any:
        return torch_features.choose("a test", load, fallback, works)

    private = object()
    assert choose(lambda: torch.no_such_name, lambda _: True) is fallback
    assert choose(lambda: private, lambda _: 1 / 0 > 0) is fallback
    assert choose(lambda: private, lambda _: False) is fallback
    assert choose(lambda: private, lambda _: True) is private
    assert "a test" not in {feature.purpose for feature in FEATURES}


def test_reverse_pass() -> None:
    """First and second derivatives, an unused variable, several outputs."""

    def derivatives(run: Callable[..., Any]) -> list[Any]:
        x, y, unused = (torch.linspace(1, 2, 3).requires_grad_() for _ in range(3))
        outputs = ((x.sin() * y).sum(), (x * y).pow(3))
        vectors = (torch.ones(()), torch.linspace(0, 1, 3))
        first = run(outputs, vectors, True, True, (x, y, unused), True, accumulate_grad=False)
        second = run((first[0].sum(),), (torch.ones(()),), False, False, (x, y), True, accumulate_grad=False)
        assert x.grad is None
        return [*first, *second]

    a, b = (derivatives(run) for run in both("reverse pass"))
    assert a[2] is None
    assert b[2] is None
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True) if p is not None)


def test_batches_of_cotangents() -> None:
    """One vector; the fallback cannot take a batch apart, and calls the function with the batch."""
    for over, _ in both("batches of cotangents"):
        x = torch.ones(2, requires_grad=True)
        hidden: list[Any] = []

        class Tripled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, cotangent: Tensor, over: Any = over, hidden: list[Any] = hidden) -> Tensor:
                return over(lambda c, none: (hidden.append(c.dim()), [3 * c])[1], [cotangent, None])[0]

        (found,) = torch.autograd.grad(Tripled.apply(x), x, torch.eye(2), is_grads_batched=True)
        assert torch.equal(found, 3 * torch.eye(2))
        assert set(hidden) == {1}


def test_vmap() -> None:
    """Values, random numbers and second derivatives; an error leaves no level of mapping open."""

    def derivatives(vmap: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        rows, weight = torch.randn(3, 5, 4), torch.randn(3, 2, 4, requires_grad=True)

        def task(rows: list[Tensor], parts: dict[str, Tensor]) -> Any:
            out = F.dropout(torch.tanh(rows[0] @ parts["weight"].T))
            return out.square().sum(), {"size": parts["weight"].norm(), "one": torch.ones(())}

        losses, metrics = vmap(task, 3, [rows], {"weight": weight})
        (first,) = torch.autograd.grad(losses.sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        return [losses, *metrics.values(), first, second]

    found = [derivatives(vmap) for vmap in both("vmap over tasks")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for vmap in both("vmap over tasks"):
        with pytest.raises(ZeroDivisionError):
            vmap(lambda rows, parts: 1 / 0, 2, [torch.ones(2)], {})
        assert torch._C._functorch.maybe_current_level() is None


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("math", [True, False])
def test_attention_kernels(flash: bool, math: bool) -> None:
    """Only the math kernel inside, as often as it is entered; afterwards what was allowed before."""
    cuda = torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()
    try:
        cuda.enable_flash_sdp(flash)
        cuda.enable_math_sdp(math)
        allowed = torch_checks.allowed_attention()
        for use_math, restore in both("attention kernels"):
            outer = use_math()
            inner = use_math()
            others = [getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in ("overrideable",)]
            assert torch_checks.allowed_attention() == [True, False, False, False]
            assert not any(others)
            restore(inner)
            assert torch_checks.allowed_attention() == [True, False, False, False]
            restore(outer)
            assert torch_checks.allowed_attention() == allowed
    finally:
        cuda.enable_flash_sdp(before[0])
        cuda.enable_math_sdp(before[1])


def test_profiler() -> None:
    """A profiler that runs is seen."""
    is_enabled, always = both("profiler ranges")
    assert (is_enabled(), always()) == (False, True)
    with torch.autograd.profiler.profile():
        assert (is_enabled(), always()) == (True, True)


def test_lists_of_hooks() -> None:
    """Each way to register a hook is listed until the hook is removed; the fallback lists none."""
    private, public = both("lists of hooks")
    tensor, module = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([tensor])
    for thing, kind, methods in (
        (tensor, Tensor, ["register_hook", "register_post_accumulate_grad_hook"]),
        (module, nn.Module, ["register_full_backward_hook", "register_full_backward_pre_hook"]),
        (optimizer, torch.optim.Optimizer, ["register_step_pre_hook", "register_step_post_hook"]),
    ):
        for method in methods:
            hook = getattr(thing, method)(lambda *arguments: None)
            assert (private(thing, kind), public(thing, kind)) == ([method], [])
            hook.remove()
            assert private(thing, kind) == []


def test_compiled_modules() -> None:
    """Both see the result of ``torch.compile``; what the compiler leaves out is not compiled."""
    private, public = both("compiled modules")
    module, in_place = torch.compile(nn.Linear(1, 1)), nn.Linear(1, 1)
    in_place.compile()
    assert private(module)
    assert public(module)
    assert private(in_place)
    assert private(torch.compile(abs_of))
    assert not private(torch.compiler.disable(nn.Linear(1, 1)))
    assert not private(torch.compiler.disable(abs_of))


def abs_of(x: Tensor) -> Tensor:
    return x.abs()


def test_custom_functions() -> None:
    """The class, and ones like the outputs; the fallback finds the name alone."""
    (kind, ones), (named, nothing) = both("custom functions")

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, x.sum().double()

        @staticmethod
        def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
            return 2 * g + h

    node = Twice.apply(torch.ones(3, requires_grad=True))[0].grad_fn
    assert kind(node) is Twice
    assert named(node).__name__ == "Twice"
    assert [(one.shape, one.dtype) for one in ones(node)] == [((3,), torch.float32), ((), torch.float64)]
    assert nothing(node) == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("observer", ["nobody", "hook", "scheduler"])
def test_optimizer_steps(kind: type[torch.optim.Optimizer], observer: str) -> None:
    """The same parameters, and hooks and schedulers see every step."""

    def run(step: Callable[..., None]) -> tuple[Tensor, int]:
        parameter = nn.Parameter(torch.linspace(0, 1, 5))
        optimizer = kind([parameter], lr=0.1)
        seen: list[Any] = []
        if observer == "hook":
            optimizer.register_step_post_hook(lambda *arguments: seen.append(arguments))
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer) if observer == "scheduler" else None
        for _ in range(3):
            parameter.grad = parameter.detach().cos()
            step(optimizer)
        if schedule is not None:
            schedule.step()  # warns if it has seen no step
        return parameter.detach(), len(seen)

    (a, seen), (b, again) = (run(step) for step in both("optimizer steps"))
    assert torch.equal(a, b)
    assert seen == again == (3 if observer == "hook" else 0)


def test_no_grad_in_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tangents stop in ``torch.no_grad``, for values, changes in place and ``requires_grad``."""

    def evaluate(functions: tuple[Any, ...]) -> list[Any]:
        names = ("apply_grad_mode", "are_tangents_enabled", "enable_tangents")
        for name, function in zip(names, functions, strict=True):
            monkeypatch.setattr(f"nestor.autodiff.forward_mode.{name}", function)
        with forward_ad.dual_level(), torch.enable_grad():
            x = dual(torch.ones(3), torch.arange(3.0))
            with DualMode():
                y = x * 2
                with torch.no_grad():
                    constant, required = x * 3, x.requires_grad
                    y.mul_(torch.tensor(5.0))
                    with torch.enable_grad():
                        moving = x * 7
                    joined = torch.cat([x, x])
                last = x * constant
            results = (y, constant, moving, joined, last)
            return [required, *(part for v in results for part in (primal(v), tangent(v)))]

    a, b = (evaluate(functions) for functions in both("no_grad in forward mode"))
    assert a[0] is b[0] is True
    for p, q in zip(a[1:], b[1:], strict=True):
        assert torch.equal(p, q), (p, q)


def test_subclasses_of_tensors() -> None:
    """An operation and a method, with keywords, of a subclass whose results are plain."""

    class Marked(Tensor):
        pass

    x = torch.linspace(0, 1, 3).as_subclass(Marked)
    found = [
        (call(torch.add, (x, x), {"alpha": 2}), call(Tensor.sum, (x,), None)) for call in both("subclasses of tensors")
    ]
    for a, b in zip(*found, strict=True):
        assert type(a) is type(b) is Tensor
        assert torch.equal(a, b)


def test_changes_in_place() -> None:
    """A tensor that has changed is never taken for one that has not."""
    for version in both("changes in place"):
        assert torch_checks.version(version) is (version is not torch_public.version)
        x = torch.ones(2)
        before = version(x)
        x.add_(1)
        assert version(x) != before


def test_operations_on_lists() -> None:
    """Bit for bit, on the CPU."""

    def evaluate(operations: tuple[Callable[..., Any], ...]) -> list[Tensor]:
        norm, mul, add, sub, div, sqrt, lerp, addcmul, addcdiv, *in_place = operations
        mul_, add_, div_, lerp_, addcmul_, clamp_min_, copy_ = in_place
        torch.manual_seed(0)
        a, b, c = ([torch.randn(7, 3), torch.randn(()), torch.randn(501)] for _ in range(3))
        new = [
            *norm(a),
            *mul(a, 0.3),
            *mul(a, torch.tensor(0.3)),
            *mul(a, b),
            *add(a, b),
            *add(a, b, alpha=0.1),
            *sub(a, b),
            *div(a, b),
            *div(a, 0.3),
            *sqrt(mul(a, a)),
            *lerp(a, b, 0.7),
            *addcmul(a, b, c, value=0.3),
            *addcdiv(a, b, c, value=0.3),
        ]
        lerp_(a, b, 2.0)
        mul_(a, 0.3)
        mul_(a, c)
        add_(a, b, alpha=0.1)
        add_(a, 0.7)
        div_(a, b)
        addcmul_(a, b, c, value=0.3)
        clamp_min_(b, 0.1)
        copy_(c, a)
        return [*new, *a, *b, *c]

    found = [evaluate(operations) for operations in both("operations on lists")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


Point = namedtuple("Point", "x y")


def test_structures_of_batches() -> None:
    """Tuples, named tuples, lists and dicts come back as they were; everything else is a leaf."""
    nested = [(1, Point([2], {"b": 3, "a": ()})), OrderedDict(z=4, y=None), {5}]
    (a, first), (b, second) = ((flatten(nested)) for flatten, _, _ in both("structures of batches"))
    assert a[:-2] == b[:-2] == [1, 2, 3, 4]
    for (_, unflatten, tree_map), leaves, structure in zip(
        both("structures of batches"), (a, b), (first, second), strict=True
    ):
        again = unflatten(leaves, structure)
        assert again == nested
        assert type(again[0][1]) is Point
        assert type(again[1]) is OrderedDict
        doubled = tree_map(lambda leaf: leaf * 2 if isinstance(leaf, int) else leaf, nested)
        assert doubled[0] == (2, Point([4], {"b": 6, "a": ()}))
    flatten = both("structures of batches")[1][0]
    assert flatten([1, {"a": 2}])[1] == flatten([3, {"a": 4}])[1]
    assert str(flatten([1, {"a": 2}])[1]) != str(flatten([1, {"b": 2}])[1])


def test_memory_has_no_fallback() -> None:
    """It says so, and is measured for nothing else."""
    for purpose in ("operations", "memory forecast"):
        feature = BY_PURPOSE[purpose]
        function = feature.public[0] if isinstance(feature.public, tuple) else feature.public
        with pytest.raises(NotImplementedError, match="this version of torch"):
            function(*([print] if purpose == "operations" else []))


def test_compiled_steps() -> None:
    """A graph that computes one thing twice."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x.sin() * y + x.sin(), (x * y).sum(0))

    examples = [torch.linspace(0, 1, 12).reshape(3, 4), torch.linspace(1, 2, 4)]
    expected = function(*examples)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for compile_graph in both("compiled steps"):
            found = compile_graph(make_fx(function)(*examples), examples, lambda graph: {})(*examples)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


# Whole programs: what a run computes does not depend on which functions are bound.


class Net(nn.Module):
    """Two layers and dropout, or attention."""

    def __init__(self, *, attention: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attention else None
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predict a number."""
        x = torch.tanh(self.body(x))
        if self.attention is not None:
            (x,) = self.attention(x[None], x[None], x[None], need_weights=False)[0]
        return self.head(F.dropout(x, 0.2, self.training)).squeeze(-1)


def two_levels(response: nestor.Response, optimizer: str, *, tasks: int | None = None, attention: bool = False) -> Any:
    net = Net(attention=attention).double()
    weights = nestor.Variable(torch.zeros(6, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    shape = (6, 4) if tasks is None else (tasks, 6, 4)
    data = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]

    def train(x: Tensor, net: Net, weights: nestor.Variable) -> Tensor:
        decay = sum(p.square().sum() for p in net.parameters() if p.requires_grad)
        return (torch.sigmoid(weights()) * (net(x) - x.sum(-1)).square()).mean() + 0.01 * decay

    def valid(x: Tensor, net: Net) -> Tensor:
        return (net(x) - x[..., 0]).square().mean()

    steps = getattr(torch.optim, optimizer)(net.parameters(), lr=0.05)
    return nestor.Program(
        net=nestor.Problem(net, train, optimizer=steps, data=data, response=response, unroll_steps=3, tasks=tasks),
        weights=nestor.Problem(
            weights, valid, optimizer=torch.optim.SGD(weights.parameters(), lr=1.0), data=list(reversed(data))
        ),
    )


CASES: dict[str, Callable[[], Any]] = {
    "t1t2": lambda: two_levels(nestor.T1T2(), "SGD"),
    "t1t2-forward": lambda: two_levels(nestor.T1T2(cross=nestor.ForwardMode()), "Adam"),
    "t1t2-attention": lambda: two_levels(nestor.T1T2(cross=nestor.ForwardMode()), "SGD", attention=True),
    "difference-attention": lambda: two_levels(nestor.FiniteDifference(), "SGD", attention=True),
    "implicit-attention": lambda: two_levels(
        nestor.Implicit(solver=nestor.Neumann(num_terms=3, step_size=0.01)), "SGD", attention=True
    ),
    "unrolled": lambda: two_levels(nestor.Unrolled(), "Adam"),
    "unrolled-graph": lambda: two_levels(nestor.Unrolled(checkpoint="none"), "SGD"),
    "sama": lambda: two_levels(nestor.SAMA(), "Adam"),
    "tasks-unrolled": lambda: two_levels(nestor.Unrolled(), "SGD", tasks=2),
    "tasks-t1t2": lambda: two_levels(nestor.T1T2(), "Adam", tasks=2),
}


def results() -> dict[str, list[Tensor]]:
    """Run every case for two steps of the upper level."""
    found = {}
    for name, build in CASES.items():
        torch.manual_seed(7)
        program = build()
        nestor.Engine(program, seed=0).run(6)
        found[name] = [p.detach().clone() for level in program.levels.values() for p in level.parameters]
    return found


@pytest.fixture(scope="module")
def with_fallbacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """The results of a process in which every fallback is bound."""
    path = tmp_path_factory.mktemp("fallbacks") / "results.pt"
    source = str(Path(nestor.__file__).parents[1])
    environment = {**os.environ, "NESTOR_PUBLIC_TORCH_ONLY": "1", "PYTHONPATH": source}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
    loaded: dict[str, list[Tensor]] = torch.load(path)
    return loaded


def test_programs(with_fallbacks: dict[str, list[Tensor]]) -> None:
    """Every number of a run is the same."""
    for name, expected in results().items():
        for a, b in zip(with_fallbacks[name], expected, strict=True):
            assert torch.equal(a, b), name
            assert a.isfinite().all(), name


if __name__ == "__main__":
    assert not any(feature.private for feature in FEATURES)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".torch\\.jit\\.script", category=DeprecationWarning)
    torch.save(results(), sys.argv[1])
