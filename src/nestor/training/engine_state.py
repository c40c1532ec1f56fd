"""What the state of an engine must contain, and the states of its callbacks."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nestor.checkpoints.forms import name_of
from nestor.errors import CheckpointError, NestorWarning
from nestor.training.callback import Callback
from nestor.training.description import compare

VERSION = 1
"""The version of the states that an engine returns."""

_ENTRIES = frozenset(
    [
        *("version", "run", "program", "step", "first_step", "seed", "validation"),
        *("modules", "states", "generators", "callbacks"),
    ]
)


class Identity(NamedTuple):
    """Which run it is; a resumed run has the identity of the interrupted run.

    Attributes:
        run: The name of the run in its checkpoints.
        program: The description of its program.
    """

    run: str
    program: dict[str, Any]


def check_state(state: Mapping[str, Any], own: Identity) -> None:
    """Check that a state is complete and that its program is the engine's own; nothing changes.

    Raises:
        CheckpointError: If not.
    """
    if (version := state.get("version")) != VERSION:
        raise CheckpointError(
            f"The state has the version {version or 0}; this nestor loads version {VERSION}. Finish that run with the "
            "version of nestor that began it."
        )
    if missing := _ENTRIES - state.keys():
        raise CheckpointError(f"The state has no {', '.join(sorted(missing))}: it is no whole state of an engine.")
    compare(state["program"], own.program)


def load_callbacks(callbacks: Sequence[Callback], saved: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Load the state of each callback: that of the first saved callback of the same class that no other has taken.

    A warning names the callbacks whose states are lost, and those that start anew.
    """
    left, fresh = list(saved), []
    for callback in callbacks:
        name = name_of(type(callback))
        found = next((entry for entry in left if entry[0] == name), None)
        if found is not None:
            left.remove(found)
            callback.load_state_dict(found[1])
        elif callback.state_dict():
            fresh.append(name)
    lost = [name for name, state in left if state]
    if lost or fresh:
        parts = [f"{', '.join(lost)}: lost" if lost else "", f"{', '.join(fresh)}: start anew" if fresh else ""]
        warnings.warn(
            f"The states of some callbacks were not loaded. {'; '.join(part for part in parts if part)}.",
            NestorWarning,
            stacklevel=4,
        )
