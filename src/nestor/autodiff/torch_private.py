"""The private names of torch: used here and in ``torch_compiler.py``, each with a fallback in torch's public interface.

For every feature, nestor loads the private function when it is imported and runs it on a small example (see
:mod:`nestor.autodiff.torch_checks`). Where the name is missing, raises an error or gives another result, the fallback
in :mod:`nestor.autodiff.torch_public` is bound instead. The choice is made once, at import. ``nestor doctor`` prints
the table :data:`FEATURES`.

Set the environment variable ``NESTOR_PUBLIC_TORCH_ONLY=1`` before the import to bind every fallback, for instance to
find out whether a private function causes an error with a new version of torch.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestor.autodiff import torch_checks as checks
from nestor.autodiff import torch_public as public
from nestor.autodiff.torch_compiler import load_compiler
from nestor.autodiff.torch_features import choose, features

T = TypeVar("T")
Losses: TypeAlias = tuple[Tensor, dict[str, Tensor]]


def _load_backward() -> Callable[..., tuple[Tensor | None, ...]]:
    """Load the autograd engine: the checks of ``torch.autograd.grad`` take as long as a small derivative."""
    run: Callable[..., tuple[Tensor | None, ...]] = torch.autograd.Variable._execution_engine.run_backward
    return run


def _load_vmap() -> Callable[..., Losses]:
    """Load vmap without the checks of ``torch.func.vmap``, which take longer than a small loss."""
    from torch._C import _functorch as functorch
    from torch._functorch.predispatch import lazy_load_decompositions

    def vmap(function: Callable[..., Losses], count: int, rows: list[Tensor], parts: dict[str, Tensor]) -> Losses:
        lazy_load_decompositions()
        level = functorch._vmap_increment_nesting(count, "different")
        try:
            loss, metrics = function(
                [functorch._add_batch_dim(row, 0, level) for row in rows],
                {name: functorch._add_batch_dim(part, 0, level) for name, part in parts.items()},
            )
            losses = functorch._remove_batch_dim(loss, level, count, 0)
            return losses, {k: functorch._remove_batch_dim(v, level, count, 0) for k, v in metrics.items()}
        finally:
            functorch._vmap_decrement_nesting()

    return vmap


def _load_over_batch() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Load batches of cotangents, which ``is_grads_batched=True`` hides in one tensor, and the map that makes them."""
    from torch import _C
    from torch._C._functorch import is_legacy_batchedtensor as is_batch
    from torch._vmap_internals import _vmap as map_batch

    def over_batch(function: Callable[..., Any], vectors: Sequence[Tensor | None], level: int | None = None) -> Any:
        if not any(v is not None and is_batch(v) for v in vectors):
            return function(*vectors)
        if level is None:  # the innermost one
            level = _C._vmapmode_increment_nesting() - 1
            _C._vmapmode_decrement_nesting()
        whole = [None if v is None else torch._remove_batch_dim(v, level, 1, 0) for v in vectors]
        count = max(len(w) for w in whole if w is not None)  # one row if a vector is in no batch
        rows = [[w if w is None else w[row if len(w) > 1 else 0] for w in whole] for row in range(count)]
        found = [over_batch(function, row, level - 1) for row in rows]
        joined = [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]
        return [None if j is None else torch._add_batch_dim(j, 0, level) for j in joined]

    return over_batch, map_batch


def _load_attention() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Load the flags of the kernels: ``torch.nn.attention.sdpa_kernel`` takes as long as a small loss."""
    from torch import _C

    # The last two exist in some versions of torch only.
    names = [n for n in ("flash", "mem_efficient", "cudnn", "overrideable", "fa3") if f"_set_sdp_use_{n}" in vars(_C)]
    kernels = [(getattr(_C, f"_get_{name}_sdp_enabled"), getattr(_C, f"_set_sdp_use_{name}")) for name in names]
    is_math_enabled, enable_math = _C._get_math_sdp_enabled, _C._set_sdp_use_math

    def use_math_attention() -> list[tuple[Callable[[bool], None], bool]]:
        changed = [(enable, True) for is_enabled, enable in kernels if is_enabled()]
        for enable, _ in changed:
            enable(False)
        if not is_math_enabled():
            enable_math(True)
            changed.append((enable_math, False))
        return changed

    def restore_attention(changed: list[tuple[Callable[[bool], None], bool]]) -> None:
        for enable, before in changed:
            enable(before)

    return use_math_attention, restore_attention


def _load_profiler() -> Callable[[], bool]:
    """Load the profiler's flag: a range takes 4 us even if no profiler records it."""
    from torch._C._autograd import _profiler_enabled

    return _profiler_enabled


def _load_step() -> Callable[[Optimizer], None]:
    """Load ``step`` without torch's wrapper, a profiler range and calls of hooks, which takes about 5 us."""
    from torch.optim import optimizer as module

    before_all, after_all = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks

    def step(optimizer: Any) -> None:
        method = type(optimizer).step
        direct = getattr(method, "__wrapped__", None)
        if (
            direct is None
            or not getattr(method, "hooked", False)  # set by torch where it has wrapped the method
            or "step" in vars(optimizer)  # a scheduler counts the calls
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or before_all
            or after_all
            or is_profiler_enabled()
        ):
            optimizer.step()
        else:
            direct(optimizer)

    return step


def _load_tangents() -> tuple[Callable[..., Any], Callable[[], bool], Callable[[bool], None]]:
    """Load the flag of forward mode, and a function that makes ``torch.no_grad`` set this flag too."""
    from torch import _C

    are_tangents_enabled, enable_tangents = _C._is_fwd_grad_enabled, _C._set_fwd_grad_enabled
    set_grad_enabled = _C._set_grad_enabled

    def apply_grad_mode(func: Any, args: Any, kwargs: Any, before: list[bool]) -> tuple[Any, Any]:
        # Only a change of the grad mode matters: torch runs the jvp and the backward of a Function with gradients
        # disabled and tangents enabled. If such code enables gradients temporarily, the list stores that tangents must
        # stay enabled afterwards.
        if func is set_grad_enabled and args[0] != torch.is_grad_enabled():
            if args[0]:
                before.append(are_tangents_enabled())
                enable_tangents(True)
            else:
                enable_tangents(before.pop() if before else False)
        return args, kwargs

    return apply_grad_mode, are_tangents_enabled, enable_tangents


def _load_call_on_plain() -> Callable[[Any, tuple[Any, ...], dict[str, Any] | None], Any]:
    """Load a call that does what ``Tensor.__torch_function__`` does, without its type tests."""
    from torch._C import DisableTorchFunctionSubclass

    def call_on_plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs) if kwargs else func(*args)

    return call_on_plain


def _load_version() -> Callable[[Tensor], object]:
    """Load the counter of in-place changes of a tensor."""
    return operator.attrgetter("_version")


def _load_hooks() -> Callable[[Any, type], list[str]]:
    """Load the dictionaries of hooks; ``register_`` and the second name are the method that fills a dictionary."""
    kept = {
        Tensor: {"_backward_hooks": "hook", "_post_accumulate_grad_hooks": "post_accumulate_grad_hook"},
        nn.Module: {"_backward_hooks": "full_backward_hook", "_backward_pre_hooks": "full_backward_pre_hook"},
        Optimizer: {"_optimizer_step_pre_hooks": "step_pre_hook", "_optimizer_step_post_hooks": "step_post_hook"},
    }
    return lambda thing, kind: [f"register_{method}" for name, method in kept[kind].items() if getattr(thing, name)]


def _load_is_compiled() -> Callable[[Any], bool]:
    """Load the marks of ``torch.compile`` on functions and modules, and of ``module.compile()``."""
    call = operator.attrgetter("_compiled_call_impl")
    return lambda thing: "get_compiler_config" in vars(thing) or (isinstance(thing, nn.Module) and bool(call(thing)))


def _load_custom_function() -> tuple[Callable[[Any], type], Callable[[Any], list[Tensor]]]:
    """Load the class of a custom function's node, and ones like the gradients that its backward takes."""
    ones = lambda n: [torch.ones(m.shape, dtype=m.dtype, device=m.device) for m in n._input_metadata]  # noqa: E731
    return operator.attrgetter("_forward_cls"), ones


def _load_foreach() -> tuple[Callable[..., Any], ...]:
    """Load the operations that process a list of tensors in one kernel."""
    names = ("norm", "mul", "add", "sub", "div", "sqrt", "lerp", "addcmul", "addcdiv")
    in_place = ("mul_", "add_", "div_", "lerp_", "addcmul_", "clamp_min_", "copy_")
    return tuple(getattr(torch, f"_foreach_{name}") for name in names + in_place)


def _load_tree() -> tuple[Callable[[Any], tuple[list[Any], Any]], Callable[..., Any], Callable[..., Any]]:
    """Load torch's pytrees, which include the classes that other libraries register."""
    from torch.utils import _pytree

    return _pytree.tree_flatten, _pytree.tree_unflatten, _pytree.tree_map


def _load_intercept() -> Callable[[Callable[..., Any]], AbstractContextManager[object]]:
    """Load a mode that calls a function in the place of every operation, including those of a reverse pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Intercept(TorchDispatchMode):
        def __init__(self, call: Callable[..., Any]) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self._call = call

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return self._call(func, args, kwargs or {})

    return Intercept


def _load_fake() -> tuple[Callable[[], Any], type[Exception]]:
    """Load tensors that have shapes and devices but no values."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    return partial(FakeTensorMode, allow_non_fake_inputs=True), DataDependentOutputException


run_backward: Final = choose("reverse pass", _load_backward, public.run_backward, checks.run_backward)
vmap: Final = choose("vmap over tasks", _load_vmap, public.vmap, checks.vmap)
over_batch, _ = choose("batches of cotangents", _load_over_batch, public.OVER_BATCH, checks.over_batch)
use_math_attention, restore_attention = choose("attention kernels", _load_attention, public.ATTENTION, checks.attention)
is_profiler_enabled: Final = choose("profiler ranges", _load_profiler, public.is_profiler_enabled, checks.profiler)
optimizer_step: Final = choose("optimizer steps", _load_step, public.optimizer_step, checks.optimizer_step)
apply_grad_mode, are_tangents_enabled, enable_tangents = choose(
    "no_grad in forward mode", _load_tangents, public.TANGENTS, checks.tangents
)
call_on_plain: Final = choose("subclasses of tensors", _load_call_on_plain, public.call_on_plain, checks.call_on_plain)
version: Final = choose("changes in place", _load_version, public.version, checks.version)
hooks_of: Final = choose("lists of hooks", _load_hooks, public.hooks_of, checks.hooks_of)
is_compiled: Final = choose("compiled modules", _load_is_compiled, public.is_compiled, checks.is_compiled)
class_of, cotangents_of = choose("custom functions", _load_custom_function, public.CUSTOM_FUNCTION, checks.custom)
_foreach = choose("operations on lists", _load_foreach, public.FOREACH, checks.foreach)
foreach_norm, foreach_mul, foreach_add, foreach_sub, foreach_div, foreach_sqrt, foreach_lerp = _foreach[:7]
foreach_addcmul, foreach_addcdiv, foreach_mul_, foreach_add_, foreach_div_, foreach_lerp_ = _foreach[7:13]
foreach_addcmul_, foreach_clamp_min_, foreach_copy_ = _foreach[13:]
tree_flatten, tree_unflatten, tree_map = choose("structures of batches", _load_tree, public.TREE, checks.tree)
intercept_operations: Final = choose("operations", _load_intercept, public.intercept_operations, checks.exists)
fake_tensor_mode, DataDependentError = choose("memory forecast", _load_fake, public.FAKE_TENSORS, checks.exists)
compile_graph: Final = choose("compiled steps", load_compiler, public.compile_graph, checks.exists)

FEATURES: Final = tuple(features)


def watch_operations(observe: Callable[[Any, Any], None]) -> AbstractContextManager[object]:
    """Return a context that calls ``observe(arguments, result)`` after every operation, also of a reverse pass."""

    def call(function: Any, args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        observe((args, kwargs), result)
        return result

    return intercept_operations(call)  # type: ignore[no-any-return]


def tensor_slot(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dict and the key under which a module stores a named parameter or buffer.

    The two private dicts of ``nn.Module`` have no fallback. They have existed as long as the class, and the public
    ``torch.func.functional_call`` replaces a tensor for one call only.
    """
    prefix, _, key = name.rpartition(".")
    owner = module.get_submodule(prefix)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


def layer_slot(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dict and the key under which a module stores a named layer; see :func:`tensor_slot`."""
    prefix, _, key = name.rpartition(".")
    return module.get_submodule(prefix)._modules, key
