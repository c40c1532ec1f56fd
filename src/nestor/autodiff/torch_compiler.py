"""Torch's compiler of graphs, without its Python frontend; private names of torch, as in ``torch_private.py``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

Compiled: TypeAlias = Callable[..., Sequence[Tensor]]


def load_compiler() -> Callable[..., Compiled]:
    """Load the compiler of FX graphs. It is imported at the first use, which takes seconds."""
    if find_spec("torch._inductor") is None or find_spec("torch._functorch.compile_utils") is None:
        raise ImportError
    return compile_graph


def compile_graph(
    graph: fx.GraphModule, examples: Sequence[Tensor], options_of: Callable[[Any], Mapping[str, Any]]
) -> Compiled:
    """Compile a graph for arguments like ``examples``.

    Args:
        graph: The graph, which is changed.
        examples: The arguments.
        options_of: Returns the options of the compiler for the graph in which equal operations are merged.
    """
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    graph.graph = fx_graph_cse(graph.graph)
    graph.graph.eliminate_dead_code()
    options, code = dict(options_of(graph)), GeneratedCode(compile_fx_inner)
    for node in graph.graph.nodes:
        node.meta.clear()  # the tensors of the trace, which the compiler would compare with its own
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    with _wrapper_on_stack(options):
        wrapped: Any = compile_fx(graph, list(examples), inner_compile=code, config_patches=options)
    return code.unwrapped(wrapped, examples)


@contextmanager
def _wrapper_on_stack(options: Mapping[str, Any]) -> Iterator[None]:
    """Generate code that allocates on the stack, if the options ask for it.

    Torch chooses the class that writes such code when a process compiles its first graph, by the options of that one.
    """
    if not options.get("aot_inductor.allow_stack_allocation"):
        yield
        return
    from torch._inductor.codegen.common import device_codegens, init_backend_registration
    from torch._inductor.codegen.cpp_wrapper_cpu_array_ref import CppWrapperCpuArrayRef

    init_backend_registration()
    usual = device_codegens["cpu"]
    device_codegens["cpu"] = replace(usual, cpp_wrapper_codegen=CppWrapperCpuArrayRef)
    try:
        yield
    finally:
        device_codegens["cpu"] = usual


class GeneratedCode:
    """Compiles the graphs that torch's frontend passes on, and keeps what it returns for them.

    The wrappers handle what these graphs do not have: inputs that require gradients or change, autocast, subclasses.
    They take 9 us a call; the code of a tiny graph takes as long.

    Args:
        compile: Compiles a graph.
    """

    def __init__(self, compile: Callable[..., Any]) -> None:
        self._compile = compile
        self._kept: list[tuple[Any, Sequence[Any]]] = []

    def __call__(self, graph: Any, examples: Sequence[Any], *args: Any, **options: Any) -> Any:
        """Compile a graph for arguments like ``examples``."""
        compiled = self._compile(graph, examples, *args, **options)
        self._kept.append((compiled, list(examples)))
        return compiled

    def unwrapped(self, wrapped: Compiled, examples: Sequence[Tensor]) -> Compiled:
        """Return the code itself if it does the same as the wrapped function, bit by bit; else the wrapped function.

        Args:
            wrapped: The compiled function.
            examples: Arguments. Neither function changes them.
        """
        # Code reads its arguments by address: with other ones, it would end the process.
        if len(self._kept) != 1 or list(map(_kind, self._kept[0][1])) != list(map(_kind, examples)):
            return wrapped
        call: Callable[[list[Tensor]], Sequence[Tensor]] = self._kept[0][0].current_callable

        def direct(*arguments: Tensor) -> Sequence[Tensor]:
            return call(list(arguments))

        expected = [tensor.clone() for tensor in wrapped(*examples)]  # the next call may write into the same memory
        given = [tensor.clone() for tensor in examples]
        try:
            found = direct(*examples)
        except Exception:  # what another version of torch calls code may take other arguments
            return wrapped
        same = _are_same(found, expected) and _are_same(examples, given)
        return direct if same else wrapped


def _are_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_is_same, found, expected))


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return _kind(found) == _kind(expected) and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _kind(value: Any) -> Any:
    """Return what code takes for granted of an argument, and what is the same for equal results."""
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
