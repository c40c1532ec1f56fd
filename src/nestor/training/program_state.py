"""The state of all levels and modules of a run as plain data, for checkpoints."""

import copy
from collections.abc import Mapping
from typing import Any

from nestor.data.random_numbers import all_untouched
from nestor.distributed import Runtime
from nestor.levels.level import Level
from nestor.training.level_checkpoint import level_state_dict, load_level_state
from nestor.training.level_state import LevelState
from nestor.training.module_state import check_module_state, load_module_state, module_state, modules_of


def program_state_dict(
    levels: Mapping[str, Level], states: Mapping[str, LevelState], runtime: Runtime
) -> dict[str, Any]:
    """Return the states of all modules and levels; the tensors are not copies in one process."""
    with runtime.whole_modules():
        modules = [module_state(module) for module in modules_of(levels)]
        if runtime.size > 1:
            modules = copy.deepcopy(modules)  # the runtime may free the memory of the modules
    return {"modules": modules, "states": {name: level_state_dict(state, levels) for name, state in states.items()}}


def load_program_state(
    state: Mapping[str, Any], levels: Mapping[str, Level], states: Mapping[str, LevelState], runtime: Runtime, seed: int
) -> None:
    """Load what :func:`program_state_dict` returned; ``seed`` is the seed of the run that was saved.

    Raises:
        ValueError: If the state belongs to another program; nothing has changed then.
    """
    modules = modules_of(levels)
    if list(state["states"]) != list(states) or len(state["modules"]) != len(modules):
        raise ValueError(
            f"The state is that of a program with the levels {list(state['states'])}, this one has "
            f"{list(states)}. Build the engine as it was built for the run that was saved."
        )
    for module, saved in zip(modules, state["modules"], strict=True):
        check_module_state(module, saved)
    with runtime.whole_modules():
        for module, saved in zip(modules, state["modules"], strict=True):
            load_module_state(module, saved)
    with all_untouched():
        for name, own in states.items():
            own.draws.reseed(seed)
            load_level_state(own, state["states"][name], levels)
