"""A traced step and its pullback, split into two graphs: one takes the step, the other one pulls cotangents back."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nestor.compilation.arguments import Unsuitable
from nestor.compilation.generated import Compiled, compiled
from nestor.compilation.graph import Operator

_ATEN = torch.ops.aten
# Views and new tensors: the second graph makes them again. Pointwise operations too, as part of its own kernels.
_REPEATED = (
    *(_ATEN.t, _ATEN.view, _ATEN.permute, _ATEN.transpose, _ATEN.expand, _ATEN.unsqueeze, _ATEN.squeeze, _ATEN.alias),
    *(_ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.zeros, _ATEN.ones, _ATEN.full, _ATEN.scalar_tensor),
)


@dataclass(frozen=True)
class SplitGraph:
    """Two compiled graphs.

    Attributes:
        take: Maps the arguments to the results of the step, and to the tensors that the second graph needs.
        pull: Maps the constants, the arguments, these tensors and the cotangents to the results of the pullback.
        constants: Tensors that the functions read from outside.
        cotangents: Number of cotangents, the last arguments.
    """

    take: Compiled
    pull: Compiled
    constants: Sequence[Tensor]
    cotangents: int

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Take the step: the cotangents are not read."""
        return self.take(*self.constants, *arguments[: len(arguments) - self.cotangents])

    def pull_back(
        self, arguments: Sequence[Tensor], saved: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Pull cotangents back through the step; ``saved`` are its results after those of the step."""
        return self.pull(*self.constants, *arguments[: len(arguments) - self.cotangents], *saved, *cotangents)


def split_graph(
    graph: Any, constants: Sequence[Tensor], examples: Sequence[Tensor], kept: int, cotangents: int
) -> SplitGraph:
    """Compile a traced function whose first ``kept`` results do not depend on its last ``cotangents`` arguments.

    Raises:
        Unsuitable: If they do, or if torch's compiler fails.
    """
    first, second = _split(graph, kept, cotangents)
    arguments, sent = examples[: len(examples) - cotangents], examples[len(examples) - cotangents :]
    take = compiled(first, (), [*constants, *arguments])
    with torch.no_grad():
        saved = list(take(*constants, *arguments))[kept:]
    pull = compiled(second, (), [*constants, *arguments, *saved, *sent])
    return SplitGraph(take, pull, constants, cotangents)


def _split(graph: Any, kept: int, cotangents: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    nodes = list(graph.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    given, sent = places[: len(places) - cotangents], places[len(places) - cotangents :]
    *results, _ = next(node for node in nodes if node.op == "output").args[0]
    after = set(sent)
    for node in nodes:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    if not after.isdisjoint(results[:kept]):
        raise Unsuitable("the state after a step depends on its cotangents")
    repeated, saved = _needed(results[kept:], after)
    return (
        _graph(graph, given, [n for n in nodes if n not in after and n.op not in _ENDS], [*results[:kept], *saved]),
        _graph(graph, [*given, *saved, *sent], [n for n in nodes if n in repeated], results[kept:]),
    )


def _needed(results: Sequence[fx.Node], after: set[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """Return the nodes that the second graph contains, and those whose values it is given."""
    repeated: set[fx.Node] = set()
    saved: dict[fx.Node, None] = {}
    open_nodes = list(results)
    while open_nodes:
        node = open_nodes.pop()
        if node in repeated or node.op == "placeholder":
            continue
        if node in after or _is_repeated(node):
            repeated.add(node)
            open_nodes += node.all_input_nodes
        else:
            saved[node] = None
    return repeated, list(saved)


def _is_repeated(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem or not isinstance(target, Operator):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _REPEATED


_ENDS = ("placeholder", "output")


def _graph(module: Any, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Any:
    """Build a graph of some nodes; ``inputs`` become its placeholders."""
    new = fx.Graph()
    known = {node: new.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node not in known:
            known[node] = new.node_copy(node, known.__getitem__)
    new.output(tuple(known[node] for node in outputs))
    new.eliminate_dead_code()
    return fx.GraphModule(module, new)
