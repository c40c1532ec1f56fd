"""The memory of the graph of a step, for the choice between kept graphs and repeated steps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nestor.autodiff.torch_private import tree_flatten
from nestor.optim.state import State
from nestor.responses.unrolling.step import Step, StepVJP, TakenStep
from nestor.vectors import Params

SMALL = 2**28
"""Bytes of graphs that are kept at one time, even if they are larger than the states of their steps: 256 MiB."""


def may_keep(graph: int, state: State, count: int) -> bool:
    """Return whether the graphs of ``count`` steps are kept: each not larger than a state, or all small."""
    return graph <= _bytes(state.tensors()) or count * graph <= SMALL


def take_step(step: Step, state: State, given: Params, *, measure: bool) -> tuple[TakenStep, int | None]:
    """Take a step with its own graph, and count the bytes of the tensors that the graph keeps.

    Tensors that exist without the graph are not counted: variables, inputs and batches.

    Returns:
        The graph, and its size; None without ``measure``, and if the loss uses ``torch.func``, which does not allow to
        observe a graph.
    """
    if step.compiler is not None and (found := step.compiler.vjp(step, state, given)) is not None:
        return found
    if not measure:
        return step.vjp(state, given), None
    saved: list[torch.UntypedStorage] = []

    def observe(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    def build() -> StepVJP:
        with saved_tensors_hooks(observe, lambda tensor: tensor):
            return step.vjp(state, given)

    try:
        taken = build()
    except RuntimeError:
        return step.vjp(state, given), None
    batches = [leaf for draw in step.record.draws for leaf in tree_flatten(draw.batch)[0] if isinstance(leaf, Tensor)]
    # Tensors that share a storage return the same object.
    held = {id(t.untyped_storage()) for t in (*state.params, *given, *batches)}
    return taken, sum({id(s): s.nbytes() for s in saved if id(s) not in held}.values())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
