"""The choice between kept graphs of steps and steps that are evaluated again."""

from nestor.optim.state import State

SMALL = 2**29
"""Bytes of graphs that are kept at one time, even if they are larger than the states of their steps: 512 MiB."""


def may_keep(graph: int, state: State, count: int) -> bool:
    """Return whether the graphs of ``count`` steps are kept: each not larger than a state, or all small.

    Args:
        graph: Bytes of the graph of one step.
        state: The state before the step.
        count: Number of steps whose graphs exist at one time.
    """
    return graph <= sum(t.nbytes for t in state.tensors()) or count * graph <= SMALL
