"""What a process is about to run, in words that can be compared."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from nestor.data.zipped import loaders_of
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.training.callback import Callback


def describe_run(
    evaluator: Evaluator, callbacks: Sequence[Callback], validate: Callable[..., Any] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe what must be equal in all processes of a run; callbacks with ``only_first`` may differ.

    Args:
        evaluator: The levels.
        callbacks: The callbacks.
        validate: The validation.
        options: Further options of the engine, by name.
    """
    shared = [type(callback).__name__ for callback in callbacks if not callback.only_first]
    found: dict[str, Any] = {
        "levels": ", ".join(evaluator.levels),
        "the nesting": type(evaluator.nesting).__name__,
        "callbacks": ", ".join(shared) or "none",
    }
    for name, level in evaluator.levels.items():
        found |= {f"level {name!r}: {key}": text for key, text in _level(level)}
    found["validate="] = "None" if validate is None else getattr(validate, "__name__", type(validate).__name__)
    return found | {f"{name}=": value for name, value in options.items()}


def _level(level: Level) -> Iterator[tuple[str, str]]:
    problem = level.problem
    yield "reads", ", ".join([*level.links.lower_levels, *level.links.upper_levels]) or "no level"
    yield "variables", ", ".join(f"{tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}" for p in level.parameters)
    yield "module", type(problem.module).__name__
    yield "optimizer", type(problem.optimizer).__name__
    yield "response", level.response.describe() if level.links.upper_levels else "none"
    for option in ("unroll_steps", "warmup_steps", "accumulate", "clip_norm", "tasks", "init", "precision"):
        yield option, repr(getattr(problem, option))
    yield "data", describe_data(problem.data)


def describe_data(data: Any) -> str:
    """Describe data by class and length, as far as they tell it."""
    if isinstance(data, DataLoader):
        return f"{type(data).__name__} of {_length(data.dataset)} rows in batches of {data.batch_size}"
    if (loaders := loaders_of(data)) is not None:
        return " and ".join(map(describe_data, loaders))
    return f"{type(data).__name__} of length {_length(data)}"


def _length(data: Any) -> str:
    try:
        return str(len(data))
    except (TypeError, NotImplementedError):
        return "unknown"
