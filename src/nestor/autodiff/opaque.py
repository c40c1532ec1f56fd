"""Custom Functions whose backward torch does not differentiate correctly, though it raises no error."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nestor.autodiff.derivatives import Derivatives, Kinds
from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.torch_private import tree_flatten

Evaluate: TypeAlias = Callable[[Sequence[Tensor], Callable[[Tensor], Any]], Any]
"""``evaluate(tensors, read)`` evaluates a loss at other tensors, and returns ``read(value)``."""

# Number of entries of a derivative that are compared.
_ENTRIES = 16


def block_opaque(
    known: Derivatives,
    level: str,
    term: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    value: Tensor,
    arguments: tuple[Sequence[Tensor], Sequence[Tensor]],
    scoped: Callable[[], AbstractContextManager[Any]],
    anchors: Sequence[Tensor] | None,
) -> None:
    """Make a second derivative that torch would get wrong an error; look for the Functions at the first call.

    Args:
        known: What is known about the derivatives of the level's loss.
        level: Name of the level.
        term: The function that was evaluated.
        value: Its value, with a graph that is differentiated next, with ``create_graph=True``.
        arguments: The level's variables and the tensors of the levels above, leaves of the graph.
        scoped: Opens a scope for another evaluation.
        anchors: The tensors that ``value`` is differentiated with respect to; None means the arguments.
    """
    if is_tracing():
        return
    theta, inputs = arguments
    tensors = [t for t in (*theta, *inputs) if t.requires_grad]

    def evaluate(moved: Sequence[Tensor], read: Callable[[Tensor], Any]) -> Any:
        others = iter(moved)
        there = [next(others) if t.requires_grad else t for t in (*theta, *inputs)]
        with scoped():
            return read(term(there[: len(theta)], there[len(theta) :]))

    if known.opaque is None:
        whole = value if anchors is None or not custom_nodes(value) else term(theta, inputs)
        try:
            known.opaque = opaque_kinds(whole, tensors, evaluate)
        except Exception:  # a backward that cannot be evaluated so: the caller's own pass raises its error
            known.opaque = frozenset()
    if known.opaque:
        _block(value, known.opaque, tensors if anchors is None else anchors, partial(known.opaque_error, level))


def opaque_kinds(value: Tensor, tensors: Sequence[Tensor], evaluate: Evaluate) -> Kinds:
    """Find the custom Functions in a graph whose backward is not what its own graph says.

    A backward computes ``b(s, c)`` from saved tensors ``s`` and cotangents ``c``. Its graph leads to the saved tensors
    only if it consists of differentiable operations, and if every saved tensor is an input or an output. Otherwise
    (``once_differentiable``, numpy, kernels, gradients that the forward computed) torch leaves out a part of the second
    derivative. The function moves all variables a little, twice, and compares the change of ``b`` with the change that
    the graph predicts. Entries whose change is not proportional to the move are not compared: a straight-through
    estimator, whose derivative jumps, passes.

    Args:
        value: The loss, with a graph.
        tensors: Its variables, leaves of the graph.
        evaluate: Evaluates the loss at other variables.
    """
    nodes = custom_nodes(value)
    places = {type(node): place for place, node in reversed(list(enumerate(nodes)))}
    if not places:
        return frozenset()
    cotangents = {kind: _cotangents(value, tensors, nodes[place]) for kind, place in places.items()}

    def read(moved: Tensor) -> dict[type, tuple[list[Tensor | None], list[Tensor]]]:
        there = custom_nodes(moved)
        if [type(node) for node in there] != [type(node) for node in nodes]:
            return {}
        return {
            kind: (_detached(_backward(there[place], cotangents[kind])), _detached(_sources(there[place])))
            for kind, place in places.items()
            if cotangents[kind]
        }

    once, twice = (evaluate([_moved(t, times) for t in tensors], read) for times in (1, 2))
    return frozenset(
        kind
        for kind, place in places.items()
        if kind in once and kind in twice and _is_opaque(nodes[place], cotangents[kind], once[kind], twice[kind][0])
    )


def custom_nodes(value: Tensor) -> list[BackwardCFunction]:
    """List the nodes of custom Functions in the graph of a tensor."""
    return [node for node in _reachable(value.grad_fn) if isinstance(node, BackwardCFunction)]


def _reachable(start: Any) -> dict[Any, None]:
    found: dict[Any, None] = {}
    stack = [start]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack.extend(following for following, _ in node.next_functions)
    return found


def _cotangents(value: Tensor, tensors: Sequence[Tensor], node: Any) -> list[tuple[int, Tensor]]:
    """Return the cotangents that arrive at the outputs of a node."""
    arrived: list[Sequence[Tensor | None]] = []
    handle = node.register_prehook(arrived.append)
    torch.autograd.grad(value, list(tensors), retain_graph=True, allow_unused=True)
    handle.remove()
    return [(place, c.detach()) for c_all in arrived for place, c in enumerate(c_all) if c is not None]


def _backward(node: Any, cotangents: list[tuple[int, Tensor]]) -> list[Tensor | None]:
    """Evaluate the backward of one node, with a graph."""
    edges = [GradientEdge(following, place) for following, place in node.next_functions if following is not None]
    outputs = [GradientEdge(node, place) for place, _ in cotangents]
    vectors = [vector for _, vector in cotangents]
    return list(torch.autograd.grad(outputs, edges, vectors, create_graph=True, allow_unused=True))


def _sources(node: Any) -> list[Tensor]:
    """List the tensors from which a backward computes: those that were saved, and those among the attributes."""
    values = [*node.saved_tensors, *tree_flatten(dict(vars(node)))[0]]
    return [v for v in values if isinstance(v, Tensor)]


def _detached(tensors: Iterable[Tensor | None]) -> list[Any]:
    return [None if t is None else t.detach() for t in tensors]


def _moved(tensor: Tensor, times: int) -> Tensor:
    size = times * {torch.float64: 1e-6, torch.float32: 1e-3}.get(tensor.dtype, 1e-2)
    wave = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=tensor.dtype).sin().view_as(tensor)
    with torch.no_grad():
        return (tensor + size * (1 + tensor.abs()) * wave).requires_grad_()


def _is_opaque(
    node: Any,
    cotangents: list[tuple[int, Tensor]],
    once: tuple[list[Tensor | None], list[Tensor]],
    twice: list[Tensor | None],
) -> bool:
    # One entry for each place of the graph: a tensor may be saved twice.
    pairs = [(s, there - s.detach()) for s, there in zip(_sources(node), once[1], strict=True) if s.requires_grad]
    moves = list({get_gradient_edge(s): (s, move) for s, move in pairs}.values())
    for here, there, further in zip(_backward(node, cotangents), once[0], twice, strict=True):
        if here is None or there is None or further is None or not here.is_floating_point():
            continue
        change, double = (t.reshape(-1) - here.detach().reshape(-1) for t in (there, further))
        noise = 100 * torch.finfo(here.dtype).eps * here.detach().abs().max()
        changed = (change.abs() > noise).nonzero()[:, 0]
        smooth = changed[(double - 2 * change)[changed].abs() < 0.2 * change[changed].abs()]
        if len(smooth) == 0 or 2 * len(smooth) < len(changed):
            continue
        chosen = smooth[torch.linspace(0, len(smooth) - 1, min(len(smooth), _ENTRIES)).long()].tolist()
        wrong = sum(abs(_predicted(here, k, moves) - float(change[k])) > 0.1 * abs(float(change[k])) for k in chosen)
        if 2 * wrong > len(chosen):
            return True
    return False


def _predicted(backward: Tensor, entry: int, moves: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the change of an entry of a backward, by its own graph."""
    if not backward.requires_grad or not moves:
        return 0.0
    found = torch.autograd.grad(
        backward.reshape(-1)[entry], [s for s, _ in moves], retain_graph=True, allow_unused=True
    )
    return float(sum((g * move).sum() for g, (_, move) in zip(found, moves, strict=True) if g is not None))


def _block(value: Tensor, kinds: Kinds, tensors: Sequence[Tensor], error: Callable[[str], Exception]) -> None:
    """Make second derivatives through the backward of some custom Functions raise an error.

    The error is raised only where the second derivative is with respect to something that the backward depends on: its
    cotangents, or the tensors from which the input of the Function was computed.
    """
    for node in custom_nodes(value):
        if type(node) in kinds:
            before = _reachable(node)
            anchors = [t for t in tensors if t.requires_grad and get_gradient_edge(t).node in before]
            node.register_hook(_barrier(anchors, error(type(node).__name__.removesuffix("Backward"))))


def _barrier(anchors: Sequence[Tensor], error: Exception) -> Callable[..., Any]:
    def hook(grads: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled():
            return None
        behind = [*anchors, *(c for c in cotangents if c is not None and c.requires_grad)]
        return tuple(None if g is None else _Barrier.apply(error, g, *behind) for g in grads)  # type: ignore[no-untyped-call]

    return hook


class _Barrier(torch.autograd.Function):
    """The identity of its first tensor; its backward raises an error."""

    @staticmethod
    def forward(ctx: Any, error: Exception, grad: Tensor, *behind: Tensor) -> Tensor:
        ctx.error = error
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise ctx.error
