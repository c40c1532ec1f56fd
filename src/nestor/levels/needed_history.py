"""The part of a level's history that its response needs, on the level's module."""

from dataclasses import replace

from torch import nn

from nestor.levels.level import Level
from nestor.optim.history_spec import HistorySpec

# Layers of which torch computes second derivatives operation by operation: a pass back through the graph of a gradient
# takes 1.05 to 2.2 times an evaluation in forward mode (measured: CNNs and ResNets, GRU, LSTM).
_SLOW_TWICE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RNNBase, nn.RNNCellBase),
)


def needed_history(level: Level) -> HistorySpec | None:
    """Return what the response of a level needs of its steps; None if it needs nothing.

    The graph of a single step is not kept where the module normalizes batches or is recurrent: the same derivative,
    computed anew at the same point, is faster. Graphs that are kept only if they are small are not kept where the steps
    are replayed by compiled graphs.
    """
    spec = level.response.history_spec
    if spec is None:
        return None
    if spec.graphs is None and (level.stepping.compiler is not None or level.lowers or spec.offload_to is not None):
        return replace(spec, graphs=False)
    if not spec.graphs or spec.window != 1:
        return spec
    return replace(spec, graphs=not any(isinstance(m, _SLOW_TWICE) for m in level.problem.module.modules()))
