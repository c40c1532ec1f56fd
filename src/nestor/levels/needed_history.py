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
    computed anew at the same point, is faster.
    """
    spec = level.response.history_spec
    if spec is None or not spec.graphs or spec.window != 1:
        return spec
    return replace(spec, graphs=not any(isinstance(m, _SLOW_TWICE) for m in level.problem.module.modules()))
