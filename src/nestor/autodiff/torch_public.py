"""Fallbacks, written with torch's public interface, for the private functions in :mod:`nestor.autodiff.torch_private`.

A fallback has the signature of the private function that it replaces and returns the same result. It is slower.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer


def run_backward(
    outputs: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    retain_graph: bool,
    create_graph: bool,
    wrt: tuple[Tensor, ...],
    allow_unused: bool,
    *,
    accumulate_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Run one reverse pass; ``accumulate_grad`` must be False."""
    return torch.autograd.grad(outputs, wrt, vectors, retain_graph, create_graph, allow_unused=allow_unused)


def vmap(
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    count: int,
    rows: list[Tensor],
    parts: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evaluate ``function(rows, parts)`` for ``count`` tasks, the leading dimension of every tensor."""
    result: tuple[Tensor, dict[str, Tensor]] = torch.func.vmap(function, randomness="different")(rows, parts)
    return result


def over_batch(function: Callable[..., Sequence[Tensor | None]], vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Call ``function(*vectors)``: no public function takes a batch apart, so a function must be able to map it."""
    return function(*vectors)


OVER_BATCH: Final = (over_batch, torch.func.vmap)


def use_math_attention() -> AbstractContextManager[Any]:
    """Allow only the math kernel of attention; return the argument of :func:`restore_attention`."""
    context = sdpa_kernel(SDPBackend.MATH)
    context.__enter__()
    return context


def restore_attention(before: AbstractContextManager[Any]) -> None:
    """Allow the kernels that were allowed before."""
    before.__exit__(None, None, None)


ATTENTION: Final = (use_math_attention, restore_attention)


def optimizer_step(optimizer: Optimizer) -> None:
    """Call ``optimizer.step()``."""
    optimizer.step()


def is_profiler_enabled() -> bool:
    """Return True: a range has no effect if no profiler records it."""
    return True


def apply_grad_mode(func: Any, args: Any, kwargs: Any, before: list[bool]) -> tuple[Any, Any]:
    """Return the arguments of an operation, without their tangents if gradients are disabled."""
    if torch.is_grad_enabled():
        return args, kwargs
    return tree_map(_primal, args), tree_map(_primal, kwargs)


def _primal(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    primal, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return value if tangent is None else primal


def are_tangents_enabled() -> bool:
    """Return True: :func:`apply_grad_mode` disables no tangents for later operations."""
    return True


def enable_tangents(enabled: bool) -> None:
    """Do nothing; see :func:`are_tangents_enabled`."""


TANGENTS: Final = (apply_grad_mode, are_tangents_enabled, enable_tangents)


def call_on_plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Call an operation, and treat tensors of subclasses as plain tensors."""
    return Tensor.__torch_function__(func, (), args, kwargs)  # type: ignore[no-untyped-call]


def version(tensor: Tensor) -> object:
    """Return a new object: without torch's counter, every tensor is assumed to have changed."""
    return object()


def hooks_of(thing: Any, kind: type) -> list[str]:
    """Return no name: torch has no public list of the hooks of an object."""
    return []


def is_compiled(thing: Any) -> bool:
    """Return whether an object is a module that ``torch.compile`` has returned; ``module.compile()`` is not seen."""
    return type(thing).__name__ == "OptimizedModule"


def class_of(node: Any) -> type:
    """Return a new class with the name of the custom function of a node."""
    return type(node.name().removesuffix("Backward"), (), {})


def cotangents_of(node: Any) -> list[Tensor]:
    """Return no tensor: torch does not show which gradients the backward of a node takes."""
    return []


CUSTOM_FUNCTION: Final = (class_of, cotangents_of)


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """List the leaves of nested tuples, named tuples, lists and dicts; the second result is their structure."""
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Any, leaves: list[Any]) -> tuple[type, tuple[Any, ...], tuple[Any, ...]] | None:
    """Append the leaves; return type, keys (of a dict) and parts of a container, or None for a leaf."""
    kind = type(tree)
    if kind in (dict, OrderedDict):
        return kind, tuple(tree), tuple(_flatten(part, leaves) for part in tree.values())
    if kind is list or isinstance(tree, tuple):
        return kind, (), tuple(_flatten(part, leaves) for part in tree)
    leaves.append(tree)
    return None


def tree_unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Build a nested structure from its leaves."""
    return _unflatten(structure, iter(leaves))


def _unflatten(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure is None:
        return next(leaves)
    kind, keys, parts = structure
    built = [_unflatten(part, leaves) for part in parts]
    if kind in (dict, OrderedDict):
        return kind(zip(keys, built, strict=True))
    return kind(built) if kind in (tuple, list) else kind(*built)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every leaf."""
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], structure)


TREE: Final = (tree_flatten, tree_unflatten, tree_map)


def _for_each(operation: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """Return the operation on lists that applies ``operation`` index by index; other arguments are shared."""

    def on_lists(first: list[Tensor], *others: Any, **options: Any) -> list[Tensor]:
        rows = [other if isinstance(other, list) else [other] * len(first) for other in others]
        return [operation(*row, **options) for row in zip(first, *rows, strict=True)]

    return on_lists


FOREACH: Final = tuple(
    _for_each(operation)
    for operation in (
        torch.linalg.vector_norm,
        *(torch.mul, torch.add, torch.sub, torch.div, torch.sqrt, torch.lerp, torch.addcmul, torch.addcdiv),
        *(Tensor.mul_, Tensor.add_, Tensor.div_, Tensor.lerp_, Tensor.addcmul_, Tensor.clamp_min_, Tensor.copy_),
    )
)


def intercept_operations(call: Callable[..., Any]) -> AbstractContextManager[object]:
    """Raise an error: torch has no public way to observe the operations of a reverse pass."""
    raise NotImplementedError("the memory of operations cannot be counted: this version of torch cannot observe them")


def fake_tensor_mode() -> NoReturn:
    """Raise an error: torch has no public tensors that have a device and a shape but no values."""
    raise NotImplementedError("the memory is not known in advance: this version of torch has no tensors without values")


class DataDependentError(Exception):
    """Raised if an operation needs the values of a tensor that has none."""


FAKE_TENSORS: Final = (fake_tensor_mode, DataDependentError)


def compile_graph(
    graph: fx.GraphModule, examples: Sequence[Tensor], options_of: Callable[[Any], Any]
) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph for arguments like ``examples``; the options are those of a private function."""
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return torch.compile(graph, fullgraph=True, dynamic=False)
