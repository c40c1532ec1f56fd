"""Functions of tensors that are traced once, compiled, and cached by key."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import Evaluations, add_to_counters, counting, trace, uncounted
from nestor.compilation.arguments import Arguments, Unsuitable
from nestor.compilation.generated import Compiled, OnStack, brief, compiled

Operator = type(torch.ops.aten.detach.default)


def traced(function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Trace ``function(*examples)`` and its derivatives into one FX graph; return it and its first arguments.

    The last output of the graph is true if all conditions of :func:`require_true` are true.

    Args:
        function: A function of tensors without side effects. Other tensors that it reads become inputs of the graph;
            all other outside values are frozen.
        examples: Arguments with the shapes, strides, dtypes and devices of all later arguments.

    Raises:
        Unsuitable: If the function reads values, draws random numbers, or is slower compiled.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def whole(*arguments: Tensor) -> tuple[Tensor, ...]:
        with trace() as conditions:
            results = list(function(*arguments))
            holds = torch.stack([c.reshape(()) for c in conditions]).all() if conditions else torch.ones(()).bool()
        return (*results, holds)

    # Copies: two arguments that are the same tensor now may be different tensors later.
    examples = [example.detach().clone() for example in examples]
    try:
        with torch.no_grad():
            graph: Any = make_fx(whole)(*examples)
    except Unsuitable:
        raise
    except Exception as error:
        raise Unsuitable(f"it cannot be traced ({brief(error)})") from error
    _check(graph, on_cpu=examples[0].device.type == "cpu")
    constants = _lift(graph)
    _drop_detaches(graph)
    return graph, constants


def _lift(graph: Any) -> list[Tensor]:
    """Make the outside tensors that the function reads the first arguments of the graph.

    The compiler would copy the values of small constants into the code, and later changes would have no effect.
    """
    constants: list[Tensor] = []
    first = next(iter(graph.graph.nodes))
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(value := getattr(graph, node.target), Tensor):
            with graph.graph.inserting_before(first):
                placeholder = graph.graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(placeholder)
            graph.graph.erase_node(node)
            constants.append(value.detach())
    for name, _ in [*graph.named_buffers(), *graph.named_parameters()]:
        delattr(graph, name)  # the compiler would make each one more argument
    return constants


def _drop_detaches(graph: Any) -> None:
    """Replace detached tensors by the tensors themselves, so that the compiler merges evaluations at the same point."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _check(graph: Any, *, on_cpu: bool) -> None:
    for node in graph.graph.nodes:
        if not isinstance(node.target, Operator):
            continue
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise Unsuitable("it computes with complex numbers, for which torch's compiler generates no code")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Unsuitable(f"it draws random numbers ({node.target}), and a graph would draw others")
        if on_cpu and "convolution" in str(node.target):
            raise Unsuitable("its convolutions are slower compiled, on a CPU (measured: twice the time)")


# Largest number of graphs: if the shapes of batches keep changing, compilation takes longer than eager steps.
MOST = 16

Traced: TypeAlias = tuple[Sequence[Tensor], Any]
"""The results of a graph, and a layout that describes them."""


@dataclass(frozen=True)
class CompiledGraph:
    """A compiled function of tensors.

    Attributes:
        run: The function; its last result is true if all conditions are true.
        layout: Describes the other results.
        counts: The evaluations of one call.
        code: The operations of the graph before it was compiled.
        constants: The tensors that the function reads from outside.
    """

    run: Compiled
    layout: Any
    counts: Evaluations
    code: str
    constants: Sequence[Tensor]

    def __call__(self, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the function, and add its evaluations to the open counters."""
        found = self.run(*arguments)
        add_to_counters(self.counts, 1)
        return found

    def keeping(self, arguments: Sequence[Tensor], first: int) -> Sequence[Tensor]:
        """Run the function; the last result and those before ``first`` may be valid until the next call only."""
        found = self.run.keeping(arguments, first) if isinstance(self.run, OnStack) else self.run(*arguments)
        add_to_counters(self.counts, 1)
        return found


class GraphCache:
    """Compiles each graph at its first use, and traces it once more at its second one.

    A graph contains the values that its function reads from outside: a counter, an attribute, a schedule. If the second
    trace is another one, these values change along the run.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, CompiledGraph] = {}
        self._confirmed: set[Hashable] = set()

    def is_confirmed(self, arguments: Arguments) -> bool:
        """Return whether the graph for the key of ``arguments`` was traced twice."""
        return tuple(arguments.key) in self._confirmed

    def get(
        self,
        arguments: Arguments,
        trace: Callable[..., Traced],
        compile: Callable[[Any, Sequence[Tensor], Sequence[Tensor], Any], Compiled] | None = None,
    ) -> CompiledGraph:
        """Return the graph for the key of ``arguments``; compile it from ``trace(*tensors)`` if there is none.

        Args:
            arguments: The arguments, and the key.
            trace: Returns the results of the graph, and their layout.
            compile: Compiles a graph, from its constants, examples of its arguments, and the layout.

        Raises:
            Unsuitable: If the function cannot be compiled, or reads other values than when it was.
        """
        key = tuple(arguments.key)
        try:
            graph = self._graphs.get(key)
        except TypeError as error:  # a list among the hyperparameters
            raise Unsuitable(f"a constant of the graph is not hashable ({error}); use a tuple") from None
        if graph is not None:
            if key not in self._confirmed:
                self._confirmed.add(key)
                _confirm(graph, arguments.tensors, trace)
            return graph
        if len(self._graphs) >= MOST:
            raise Unsuitable(f"its batches have had {MOST} different shapes; give them one (drop_last=True)")
        layouts: list[Any] = []

        def function(*tensors: Tensor) -> Sequence[Tensor]:
            results, layout = trace(*tensors)
            layouts.append(layout)
            return [result.detach() for result in results]

        with counting() as counts:
            found, constants = traced(function, arguments.tensors)
            code = found.code
            if compile is None:
                run = compiled(found, constants, arguments.tensors)
            else:
                run = compile(found, constants, arguments.tensors, layouts[0])
        graph = self._graphs[key] = CompiledGraph(run, layouts[0], counts, code, constants)
        return graph


def _confirm(graph: CompiledGraph, examples: Sequence[Tensor], trace: Callable[..., Traced]) -> None:
    """Trace the function of a compiled graph again, and compare.

    Raises:
        Unsuitable: If the operations, or tensors that are not those of the first trace, have changed.
    """
    with uncounted():
        found, constants = traced(lambda *tensors: [result.detach() for result in trace(*tensors)[0]], examples)
    pairs = zip(graph.constants, constants, strict=False)
    if found.code != graph.code or not all(a is b or _is_same(a, b) for a, b in pairs):
        raise Unsuitable(
            "values that it reads from outside, which a graph would freeze, have changed since it was compiled (a "
            "counter, an attribute, a schedule)"
        )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))
