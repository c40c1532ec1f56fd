"""The beginning of an engine's first run: what it refuses, what it warns about, which evaluations it inspects."""

import warnings
from collections.abc import Mapping

from torch import nn

from nestor.errors import NestorWarning
from nestor.levels.evaluator import Evaluator
from nestor.levels.inspection import inspect_next
from nestor.levels.level import Level
from nestor.levels.refusals import refuse


def begin(evaluator: Evaluator) -> None:
    """Check the levels before the first step of an engine, and inspect the first evaluation of each loss.

    A module in eval mode issues a warning.

    Raises:
        UnsupportedError: For something that no response differentiates correctly, such as a hook that was registered
            after the program was built.
    """
    refuse(evaluator.levels, evaluator.nesting)
    for level in evaluator.levels.values():
        inspect_next(level)
    _warn_about_modes(evaluator.levels)


def _warn_about_modes(levels: Mapping[str, Level]) -> None:
    names = [f"{name!r}{path and f' ({path})'}" for name, level in levels.items() for path in _asleep(level)]
    if names:
        warnings.warn(
            f"The module of level {', '.join(names)} is in eval mode: in the whole run, its dropout does nothing and "
            "its BatchNorm uses running statistics. The engine leaves modes as they are, and from_pretrained of "
            "Hugging Face returns modules in eval mode. Call module.train() before the run.",
            NestorWarning,
            stacklevel=4,
        )


def _asleep(level: Level) -> list[str]:
    """Name the highest submodules in eval mode that contain variables of the level and depend on the mode.

    A single layer in eval mode, such as a frozen BatchNorm, is what somebody wants.
    """
    variables = {id(p) for name, p in level.problem.module.named_parameters() if name in level.names}
    found: list[str] = []
    for path, module in level.problem.module.named_modules():
        is_whole = not path or any(True for _ in module.children())
        below = any(path.startswith(f"{other}.") or not other for other in found)
        if module.training or not is_whole or below or not any(id(p) in variables for p in module.parameters()):
            continue
        if any(not part.training and _depends_on_mode(part) for part in module.modules()):
            found.append(path)
    return found


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether a layer of torch computes something else in eval mode."""
    if isinstance(module, DROPOUTS):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, NORMS) and module.track_running_stats


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
