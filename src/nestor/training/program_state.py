"""The state of all levels and modules of a run as plain data, for checkpoints."""

import copy
from collections.abc import Mapping
from typing import Any

from nestor.data.random_numbers import all_untouched
from nestor.distributed import Runtime
from nestor.errors import CheckpointError
from nestor.levels.level import Level
from nestor.training.level_checkpoint import ENTRIES, level_state_dict, load_level_state
from nestor.training.level_state import LevelState
from nestor.training.module_state import load_module_state, module_state, modules_of


def program_state_dict(
    levels: Mapping[str, Level], states: Mapping[str, LevelState], runtime: Runtime
) -> dict[str, Any]:
    """Return the states of all modules and levels; the tensors are not copies in one process."""
    with runtime.whole_modules():
        modules = {name: module_state(module) for name, module in modules_of(levels).items()}
        if runtime.size > 1:
            modules = copy.deepcopy(modules)  # the runtime may free the memory of the modules
    return {"modules": modules, "states": {name: level_state_dict(state, levels) for name, state in states.items()}}


def check_program_state(state: Mapping[str, Any], states: Mapping[str, LevelState]) -> None:
    """Check that a state has every entry, and that the data of each level can go to its position.

    Raises:
        CheckpointError: If not; nothing has changed.
    """
    for name, own in states.items():
        saved = state["states"].get(name, {})
        if missing := ENTRIES - saved.keys():
            raise CheckpointError(
                f"The state has no {', '.join(sorted(missing))} of the level: another version of nestor has saved it, "
                "or it was changed since.",
                level=name,
            )
        own.draws.check(saved["draws"])


def load_program_state(
    state: Mapping[str, Any], levels: Mapping[str, Level], states: Mapping[str, LevelState], runtime: Runtime, seed: int
) -> None:
    """Load what :func:`program_state_dict` returned; ``seed`` is the seed of the run that was saved.

    :func:`check_program_state` must have passed, and the two programs must have the same structure.
    """
    with runtime.whole_modules():
        for name, module in modules_of(levels).items():
            load_module_state(module, state["modules"][name])
    with all_untouched():
        for name, own in states.items():
            own.draws.reseed(seed)
            load_level_state(own, state["states"][name], levels)
