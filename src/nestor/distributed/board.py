"""What the processes of a group tell each other without a collective: through the store of the group."""

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nestor.errors import ProcessError

# Processes that wait for the same collective give up at the same time, but for the time of the last message.
GRACE = 3.0


class Board:
    """Compares what the processes of a group are about to do. The store works where a collective would hang or abort.

    Args:
        group: The processes.
        timeout: Seconds after which a process that is not there is an error.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.timeout = timeout
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._store = group.get_group_store()

    def compare(self, what: str, description: Mapping[str, Any]) -> None:
        """Check that every process calls this method with the same arguments.

        Args:
            what: What this process is about to do, such as ``"Engine(...)"``.
            description: What must be equal, by name; values are compared as text.

        Raises:
            ProcessError: If a process differs or does not arrive; the same error in every process that is there.
        """
        number = self._store.add(f"nestor/count/{self._rank}", 1)
        self._store.set(
            f"nestor/{number}/{self._rank}",
            json.dumps([what, {name: str(value) for name, value in description.items()}]),
        )
        found: list[tuple[str, dict[str, str]]] = []
        deadline = time.monotonic() + self.timeout
        for rank in range(self._size):
            if not self._wait(f"nestor/{number}/{rank}", deadline - time.monotonic()):
                raise ProcessError(
                    f"Process {rank} has not reached {what} within {self.timeout:g} seconds, process {self._rank} has. "
                    "Every process must build the same engine and make the same calls; is it still loading, has it "
                    "ended, or does it take another branch?"
                )
            found.append(tuple(json.loads(self._store.get(f"nestor/{number}/{rank}"))))
        # Who is here has read all keys of the comparison before the last one.
        self._store.delete_key(f"nestor/{number - 2}/{self._rank}")
        for rank, (event, theirs) in enumerate(found):
            if difference := _difference(found[0], (event, theirs)):
                raise ProcessError(
                    f"The processes do not run the same program. Process {rank} has {difference[1]}, process 0 has "
                    f"{difference[0]}. Build the same engine and make the same calls in every process."
                )

    def all_arrive(self, seconds: float) -> bool:
        """Return whether every process calls this method within some seconds; all that call it get one answer."""
        number = self._store.add(f"nestor/count/{self._rank}", 1)
        arrived = self._store.add(f"nestor/{number}/arrived", 1)
        if arrived < self._size:
            self._wait(f"nestor/{number}/decision", seconds)
        decision = "all" if arrived == self._size else "not all"
        # The first process that decides does so for all.
        return bool(self._store.compare_set(f"nestor/{number}/decision", "", decision) == b"all")

    def missing(self) -> list[int]:
        """Return the processes that do not call this method, within some seconds."""
        self._store.set(f"nestor/lost/{self._rank}", "")
        deadline = time.monotonic() + GRACE
        return [
            rank
            for rank in range(self._size)
            if not self._wait(f"nestor/lost/{rank}", max(deadline - time.monotonic(), 0.1))
        ]

    def _wait(self, key: str, seconds: float) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        except dist.DistStoreError:
            return False
        return True


def _difference(first: tuple[str, dict[str, str]], other: tuple[str, dict[str, str]]) -> tuple[str, str] | None:
    """Return the first difference, as both have it."""
    if first[0] != other[0]:
        return f"reached {first[0]}", f"reached {other[0]}"
    for name in dict.fromkeys([*first[1], *other[1]]):
        ours, theirs = first[1].get(name, "nothing"), other[1].get(name, "nothing")
        if ours != theirs:
            return f"{name} {ours}", f"{name} {theirs}"
    return None
