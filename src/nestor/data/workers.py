"""Worker processes of loaders, and the signals that reach them with the process that runs."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, Self

from torch.utils.data import DataLoader

from nestor.data.reachable import reachable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def starting(data: Any) -> Iterator[None]:
    """Hold back signals while a loader starts workers that outlive them, until the workers have handlers."""
    if sys.platform == "win32" or not isinstance(data, DataLoader) or not isinstance(data.worker_init_fn, _Start):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keeps_workers(data: Any) -> bool:
    """Return whether data is a loader whose workers outlive an epoch."""
    return isinstance(data, DataLoader) and data.num_workers > 0 and data.persistent_workers


def workers_of(data: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return the context in which the workers of loaders outlive signals.

    Args:
        data: What the levels draw from; loaders are found wherever :func:`reachable` looks.
    """
    found = (part for part in reachable(list(data), closed=(DataLoader,)) if isinstance(part, DataLoader))
    loaders = [loader for loader in found if loader.num_workers]
    return LoaderWorkers(loaders) if loaders else nullcontext()


class LoaderWorkers:
    """Workers that outlive the signals SIGTERM and SIGINT until the run that draws from them has ended.

    A service manager, ``torchrun`` and a terminal signal the whole process group. The run ends after the present step,
    for which the workers load the batches. Within this context, which may be entered again inside, loaders start
    workers that ignore both signals; after it, the same workers end at either.

    Args:
        loaders: The loaders.
    """

    def __init__(self, loaders: Sequence[DataLoader[Any]]) -> None:
        self._loaders = loaders
        self._is_running: Any = RawValue("b", 0)
        self._own: list[Callable[[int], None] | None] = []
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._is_running.value = 1
            self._own = [loader.worker_init_fn for loader in self._loaders]
            for loader, own in zip(self._loaders, self._own, strict=True):
                loader.worker_init_fn = _Start(own, self._is_running)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._is_running.value = 0
            for loader, own in zip(self._loaders, self._own, strict=True):
                loader.worker_init_fn = own


@dataclass(frozen=True)
class _Start:
    """Called in a worker when it starts: installs the handlers, and calls the user's ``worker_init_fn``."""

    own: Callable[[int], None] | None
    is_running: Any  # a shared integer, 1 during the run

    def __call__(self, worker: int) -> None:
        # A handler, not SIG_IGN, which programs that the worker starts would inherit.
        for number in SIGNALS:
            signal.signal(number, self._catch)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.own is not None:
            self.own(worker)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        parent = multiprocessing.parent_process()
        if self.is_running.value and parent is not None and parent.is_alive():
            return
        # As torch's own handler does for SIGTERM: a worker that fails would be reported while the program exits.
        os._exit(0)
