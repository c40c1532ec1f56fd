"""Self-checks of the private functions in :mod:`nestor.autodiff.torch_private`, on examples with known results.

They run when nestor is imported and have no side effects: they draw no random number, start no device and no thread of
autograd's engine.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cpu")  # the default device may be another one


def run_backward(run: Callable[..., Any]) -> bool:
    """Check that the engine accepts the arguments; a complete reverse pass would start the engine's threads."""
    constant = _zeros()
    try:
        run((constant,), (constant,), False, False, (constant,), True, accumulate_grad=False)
    except RuntimeError as error:
        return "does not require grad" in str(error)
    return False


def vmap(mapped: Callable[..., Any]) -> bool:
    """Check that batches and parameters are mapped, and that a result without a task dimension gets one."""
    rows, weights = torch.arange(4.0, device="cpu").view(2, 2), torch.arange(2.0, device="cpu")
    losses, metrics = mapped(lambda x, w: (x[0].sum() * w["w"], {"zero": _zeros()}), 2, [rows], {"w": weights})
    return losses.tolist() == [0.0, 5.0] and metrics["zero"].tolist() == [0.0, 0.0]  # type: ignore[no-any-return]


def over_batch(functions: tuple[Callable[..., Any], Callable[..., Any]]) -> bool:
    """Check that the rows of a batch are taken apart and put together again, and that one vector is left alone."""
    over, map_batch = functions
    rows = torch.arange(4.0, device="cpu").view(2, 2)

    def tripled(row: Tensor) -> list[Tensor | None]:
        return [3 * row if row.tolist() in rows.tolist() else None, None]

    return map_batch(lambda row: over(tripled, [row])[0])(rows).equal(3 * rows) and over(tripled, [rows[0]])[1] is None


def attention(functions: tuple[Callable[[], Any], Callable[[Any], None]]) -> bool:
    """Check that only the math kernel is allowed inside, and that the flags are restored afterwards."""
    use_math, restore = functions
    before = allowed_attention()
    state = use_math()
    inside = allowed_attention()
    restore(state)
    return inside == [True, False, False, False] and allowed_attention() == before


def allowed_attention() -> list[bool]:
    """Read the flags of the kernels: math, flash, memory-efficient, cuDNN. Every device has these flags."""
    cuda = torch.backends.cuda
    flags = (cuda.math_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)
    return [enabled() for enabled in flags]  # type: ignore[no-untyped-call]


def profiler(is_enabled: Callable[[], bool]) -> bool:
    """Check that the flag is a boolean."""
    return isinstance(is_enabled(), bool)


class _CountedSteps(Optimizer):
    """An optimizer that only counts its steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.defaults["steps"] += 1


def optimizer_step(step: Callable[[Optimizer], None]) -> bool:
    """Check that every step runs once, and that a hook is called."""
    optimizer = _CountedSteps.__new__(_CountedSteps)  # __init__ would import torch's compiler
    optimizer.__setstate__({"defaults": {"steps": 0}, "state": {}, "param_groups": []})
    hooked: list[Any] = []
    step(optimizer)
    optimizer.register_step_post_hook(lambda *arguments: hooked.append(arguments))
    step(optimizer)
    return optimizer.defaults["steps"] == 2 and len(hooked) == 1


def tangents(functions: tuple[Callable[..., Any], Callable[[], bool], Callable[[bool], None]]) -> bool:
    """Check that ``torch.no_grad`` disables tangents in a mode that passes every operation to the first function."""
    apply, are_enabled, enable = functions

    changes: list[bool] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args, kwargs = apply(func, args, kwargs or {}, changes)
            return func(*args, **kwargs)

    before = are_enabled()
    with torch.enable_grad(), Mode():
        with torch.no_grad():
            inside = are_enabled()
        after = are_enabled()
    enable(before)
    return not inside and after and are_enabled() is before


def call_on_plain(call: Callable[..., Any]) -> bool:
    """Check that an operation on a subclass returns a plain tensor."""

    class Marked(Tensor):
        pass

    return type(call(torch.neg, (_zeros(1).as_subclass(Marked),), None)) is Tensor


def version(of: Callable[[Tensor], object]) -> bool:
    """Check that an in-place operation changes the version, and that reading the version does not."""
    tensor = _zeros(1)
    before, again = of(tensor), of(tensor)
    return before == again and before != of(tensor.add_(1))


def hooks_of(listed: Callable[[Any, type], list[str]]) -> bool:
    """Check that the hooks of a tensor, a module and an optimizer are listed, and that no other is."""
    tensor, module = _zeros(1).requires_grad_(), nn.Module()
    optimizer = _CountedSteps.__new__(_CountedSteps)  # as in optimizer_step
    optimizer.__setstate__({"defaults": {}, "state": {}, "param_groups": []})
    objects: list[tuple[Any, type]] = [(tensor, Tensor), (module, nn.Module), (optimizer, Optimizer)]
    before = [listed(*pair) for pair in objects]
    tensor.register_post_accumulate_grad_hook(lambda tensor: None)  # type: ignore[no-untyped-call]
    module.register_full_backward_pre_hook(lambda module, gradient: None)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: None)
    names = ["register_post_accumulate_grad_hook"], ["register_full_backward_pre_hook"], ["register_step_pre_hook"]
    return before == [[], [], []] and [listed(*pair) for pair in objects] == [*names]


def is_compiled(check: Callable[[Any], bool]) -> bool:
    """Check that a plain module and a plain function are not compiled; to compile one would take seconds."""
    return not check(nn.Module()) and not check(is_compiled)


class _Doubled(torch.autograd.Function):
    """A custom function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def custom(functions: tuple[Callable[[Any], type], Callable[[Any], list[Tensor]]]) -> bool:
    """Check that the class and the shape of the output are found."""
    with torch.enable_grad():
        output: Tensor = _Doubled.apply(_zeros(3).requires_grad_())  # type: ignore[no-untyped-call]
    kind, given = functions[0](output.grad_fn), functions[1](output.grad_fn)
    return kind is _Doubled and [g.shape for g in given] == [output.shape]


def tree(functions: tuple[Callable[[Any], Any], Callable[..., Any], Callable[..., Any]]) -> bool:
    """Check that tuples, lists and dicts are flattened and rebuilt."""
    flatten, unflatten, tree_map = functions
    nested = {"b": [1, (2,)], "a": 3}
    leaves, structure = flatten(nested)
    return bool(
        leaves == [1, 2, 3]
        and unflatten(leaves, structure) == nested
        and tree_map(lambda leaf: 2 * leaf, nested) == {"b": [2, (4,)], "a": 6}
    )


def foreach(operations: tuple[Callable[..., Any], ...]) -> bool:
    """Check the result of each operation on a list of two tensors."""
    norm, mul, add, sub, div, sqrt, lerp, addcmul, addcdiv, *in_place = operations
    mul_, add_, div_, lerp_, addcmul_, clamp_min_, copy_ = in_place
    a, b = [_zeros(1) + 3, _zeros(2) + 4], [_zeros(1) + 1, _zeros(2) + 2]
    found = [*norm(a[:1]), *norm(a[:1], float("inf")), *mul(a, 2.0), *mul(a, b), *add(a, b, alpha=2.0), *sub(a, b)]
    found += [*div(a, b), *div(a, 2.0), *sqrt(b[:1]), *lerp(a, b, 2.0), *addcmul(a, a, b, value=2.0)]
    found += addcdiv(a, a, b, value=2.0)
    expected = [3, 3, 6, 8, 3, 8, 5, 8, 2, 2, 3, 2, 1.5, 2, 1, -1, 0, 9, 20, 9, 8]
    lerp_(a, b, 2.0)
    copy_(b, a)
    mul_(a, -2.0)
    add_(a, b, alpha=3.0)
    add_(a, 4.0)
    addcmul_(a, b, b, value=0.5)
    div_(a, [_zeros(1) + 2, _zeros(2) + 2])
    clamp_min_(b, -0.5)
    return [x.flatten()[0].item() for x in (*found, *a, *b)] == [*expected, 1.75, 2, -0.5, 0]


def exists(function: Any) -> bool:
    """Accept any function that was loaded: an example would import torch's compiler, which takes seconds."""
    return True
