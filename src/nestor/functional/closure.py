"""The tensors that a function reads and that are not among its arguments."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.func import debug_unwrap
from torch.overrides import TorchFunctionMode

from nestor.autodiff.torch_private import tree_flatten
from nestor.errors import UnsupportedError
from nestor.vectors import Params

# The class of the graph's node of a leaf, which adds up the leaf's gradient.
_Leaf: type[Any] = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


def leaves_read(outputs: Sequence[Tensor], arguments: Params) -> list[Tensor]:
    """List the leaves of the graph of ``outputs`` that are reached other than through the arguments."""
    own = {id(argument) for argument in arguments}
    found = [output for output in outputs if output.is_leaf and output.requires_grad and id(output) not in own]
    seen: set[Node | None] = {None, *(argument.grad_fn for argument in arguments)}
    left = [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        assert node is not None
        if isinstance(node, _Leaf) and id(node.variable) not in own:
            found.append(node.variable)
        left.extend(before for before, _ in node.next_functions)
    return found


def unsupported(caller: str, function: Callable[..., Any], read: Sequence[Tensor]) -> UnsupportedError:
    """Return the error of a function that reads tensors that require gradients and are not among its arguments."""
    known = {id(tensor): name for name, tensor in _named_tensors(function)}
    listed = [
        f"{known[id(t)]!r} of shape {tuple(t.shape)}" if id(t) in known else f"a tensor of shape {tuple(t.shape)}"
        for t in read[:4]
    ]
    listed += [f"{len(read) - 4} more"] if len(read) > 4 else []
    return UnsupportedError(
        f"{caller}: the function reads {', '.join(listed) or 'a tensor'}, to be differentiated, but not among its "
        "arguments: the derivative would be missing. Pass the tensor among the inputs and use it from there. For a "
        f"module, pass the module itself, nestor.{caller}(module, theta, inputs): its parameters then get gradients. "
        "If it is a constant, use .detach()."
    )


def may_read(function: Callable[..., Any]) -> bool:
    """Return whether a function can reach a tensor that requires a gradient; it need not read it."""
    return any(tensor.requires_grad for _, tensor in _named_tensors(function))


class Watch(TorchFunctionMode):
    """Collects the tensors that operations read and that a transform of ``torch.func`` or forward mode follows.

    Outside the transform, an operation would take their values, and the derivative would be lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        followed = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and _is_followed(t)]
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError:  # an entry of a batch cannot be read outside the map
            self.found += followed
            raise
        if func is not Tensor.detach and any(isinstance(r, Tensor) for r in tree_flatten(result)[0]):
            self.found += followed
        return result


def _is_followed(tensor: Tensor) -> bool:
    return debug_unwrap(tensor) is not tensor or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _named_tensors(function: Any) -> Iterator[tuple[str, Tensor]]:
    """Name the tensors that a function can reach: by its variables, its bound arguments, its object, its modules."""
    if isinstance(function, functools.partial):
        yield from _named_tensors(function.func)
        variables = {**{str(i): a for i, a in enumerate(function.args)}, **function.keywords}
    elif inspect.ismethod(function):
        yield from _named_tensors(function.__func__)
        variables = _of_object(function.__self__)
    elif inspect.isfunction(function):
        found = inspect.getclosurevars(function)
        variables = {**found.globals, **found.nonlocals}
    else:
        variables = _of_object(function)
    for name, value in variables.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            for prefix, module in value.named_modules(prefix=name):
                held = {**vars(module), **dict(module.named_parameters(recurse=False))}
                yield from ((f"{prefix}.{key}", tensor) for key, tensor in held.items() if isinstance(tensor, Tensor))


def _of_object(owner: Any) -> dict[str, Any]:
    """Name an object, and its attributes if it is no module, whose tensors are found by their names in it."""
    if isinstance(owner, nn.Module):
        return {"self": owner}
    try:
        return {f"self.{name}": value for name, value in vars(owner).items()}
    except TypeError:  # no attributes
        return {}
