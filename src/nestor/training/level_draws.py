"""The batches of a level in a run."""

from collections.abc import Callable, Iterable
from typing import Any

from nestor.data.draws import Draws, Stream
from nestor.data.move import move
from nestor.data.source import Source
from nestor.data.zipped import Zipped, loaders_of
from nestor.distributed import Runtime
from nestor.levels.level import Level


def draws_of(level: Level, seed: int, runtime: Runtime) -> Draws:
    """Return what a level draws its batches from: this process's share of them, on the device of its variables."""
    problem, device = level.problem, level.parameters[0].device

    def stream_of(loader: Iterable[Any]) -> tuple[Stream, Callable[[Any], Any] | None]:
        # runtime.data may return a loader of this process's rows. If it returns the data unchanged, batches are split.
        data = runtime.data(loader)
        return Stream(data, level.name), runtime.share if runtime.size > 1 and data is loader else None

    stream: Source | None = None
    share = None
    if problem.data is not None and level.loss.takes_batch:
        loaders = loaders_of(problem.data)
        if loaders is None:
            stream, share = stream_of(problem.data)
        else:
            stream = Zipped([stream_of(loader) for loader in loaders])

    def prepare(batch: Any) -> Any:
        return move(batch if share is None else share(batch), device)

    return Draws(
        stream,
        level.index,
        seed,
        rank=runtime.rank,
        accumulate=problem.accumulate,
        prepare=prepare if share is not None or device.type != "cpu" else None,
    )
