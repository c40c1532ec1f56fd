"""The code that torch's compiler generates for a graph, compared with the graph."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from nestor.autodiff.torch_private import compile_graph
from nestor.compilation.arguments import Unsuitable

Compiled: TypeAlias = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class OnStack:
    """A compiled graph that writes the results of every call into the same memory, and may read it during a call.

    Attributes:
        run: The graph; its results are valid until the next call.
        constants: Its first arguments.
    """

    run: Compiled
    constants: Sequence[Tensor]

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Run the graph; return copies of the results."""
        return list(map(Tensor.clone, self.run(*self.constants, *arguments)))

    def keeping(self, arguments: Sequence[Tensor], first: int) -> list[Tensor]:
        """Run the graph; return its results, with copies of those from the ``first`` one up to the last but one."""
        found = self.run(*self.constants, *arguments)
        return [*found[:first], *map(Tensor.clone, found[first:-1]), found[-1]]


def compiled(graph: Any, constants: Sequence[Tensor], examples: Sequence[Tensor]) -> Compiled:
    """Compile a graph of :func:`traced`.

    The result is compared with that of the graph's operations, one by one, on the examples.

    Raises:
        Unsuitable: If torch's compiler fails, or computes something else.
    """
    on_stack = False

    def options(graph: Any) -> dict[str, Any]:
        nonlocal on_stack
        on_stack = _is_tiny(graph)
        on_cpu = all(example.is_cpu for example in inputs)
        return {**_OPTIONS, **(_IN_CPP if on_cpu else {}), **(_ON_STACK if on_stack else {})}

    try:
        with torch.no_grad():
            # Arguments without a graph, like those of every run.
            inputs = [t.detach() for t in (*constants, *examples)]
            expected = [t.clone() for t in fx.Interpreter(graph).run(*inputs)]
            try:
                with _without_notes():
                    inner: Compiled = compile_graph(graph, inputs, options)
                inner(*inputs)
            except Exception:  # generated code in C++ alone has more requirements, such as the headers of Python
                on_stack = False
                inner = compile_graph(graph, inputs, lambda graph: dict(_OPTIONS))
            found: Compiled = partial(inner, *constants) if constants else inner
            if on_stack:
                found = OnStack(inner, tuple(constants))
            results = found(*examples)
    except Exception as error:
        raise Unsuitable(f"torch's compiler failed on it ({brief(error)}); is a C++ compiler installed?") from error
    if not are_equal(results, expected, inputs):
        raise Unsuitable("torch's compiler computes other numbers than its operations")
    return found


def are_equal(found: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Return whether two lists of results are equal up to rounding errors, which may grow in a step.

    Results that are not finite are not compared. Small ones may be the difference of large ones: ten units of rounding
    of the largest input or result are allowed.
    """
    real = [t for t in (*expected, *inputs) if t.is_floating_point() and t.numel()]
    largest = max((float(t.abs().max().nan_to_num(0.0, 0.0, 0.0)) for t in real), default=0.0)
    return all(_is_equal(a, b, largest) for a, b in zip(found, expected, strict=True))


def _is_equal(found: Tensor, expected: Tensor, largest: float) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not bool(expected.isfinite().all()):
        return True
    eps = torch.finfo(expected.dtype).eps
    allowed = eps**0.5 * float(expected.norm()) + 10 * eps * largest * expected.numel() ** 0.5
    return bool((found - expected).norm() <= allowed)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Hide notes on operations that torch's compiler calls in a slower way: nobody who reads them can do anything."""
    logger = logging.getLogger("torch._inductor.ir")
    logger.addFilter(_is_no_note)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_note)


def _is_no_note(record: logging.LogRecord) -> bool:
    return "c-shim" not in record.getMessage()


_OPTIONS: Mapping[str, Any] = {
    # The key of a graph contains shapes and strides. The assertions take a quarter of a small graph's time.
    "size_asserts": False,
    # Vectors are computed before a product with a matrix reads them. By default, short expressions are computed again
    # for every row of the matrix, which takes up to 60 % more time.
    "realize_reads_threshold": 1,
    "realize_opcount_threshold": 5,
}
# By default, Python calls the kernels of a graph one by one and allocates their results. On small networks, that takes
# a quarter of the time.
_IN_CPP: Mapping[str, Any] = {"cpp_wrapper": True}
# Half of the time of a tiny graph goes into allocations. Torch's compiler can put at most 100 kB on the stack, if the
# graph calls no function of torch.
_ON_STACK: Mapping[str, Any] = {"aot_inductor.allow_stack_allocation": True}
# The largest total size of the results of all operations in a tiny graph, in bytes. Most of them are fused.
_TINY = 500_000


def _is_tiny(graph: Any) -> bool:
    """Return whether the results of a graph, in which equal operations are merged, are likely to fit on the stack."""
    total = 0
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
            if value.device.type != "cpu" or any(name in str(node.target) for name in ("mm", "convolution")):
                return False
    return total <= _TINY


def brief(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
