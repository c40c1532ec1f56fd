"""What a program is, as plain data, which is compared before a state is loaded."""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nestor.checkpoints.forms import name_of
from nestor.errors import CheckpointError, NestorWarning
from nestor.levels.level import Level
from nestor.training.callback import Callback

_SHOWN = 12


def describe(
    levels: Mapping[str, Level], nesting: str, callbacks: Iterable[Callback], **options: Any
) -> dict[str, Any]:
    """Describe a program and the options of its engine, as JSON.

    Returns:
        Two entries: ``structure`` must be the same in a program that loads a state, ``settings`` may differ.
    """
    return {
        "structure": {"nesting": nesting, "levels": {name: _structure(level) for name, level in levels.items()}},
        "settings": {
            "levels": {name: _settings(level) for name, level in levels.items()},
            "callbacks": [name_of(type(callback)) for callback in callbacks],
            **{name: _plain(value) for name, value in options.items()},
        },
    }


def compare(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare the description in a checkpoint with that of the program that is to load it.

    Raises:
        CheckpointError: If the structures differ; the message lists all differences.

    A warning lists the settings that differ.
    """
    if lines := list(_differences(saved["structure"], own["structure"])):
        raise CheckpointError(
            "The checkpoint is that of another program; nothing has changed. What differs:\n"
            f"{_listed(lines)}\nBuild the engine as it was built for the run that was saved."
        )
    if lines := list(_differences(saved["settings"], own["settings"])):
        warnings.warn(
            "The checkpoint was saved by a program with other settings. Hyperparameters and schedules go on as saved; "
            f"everything else is as here. What differs:\n{_listed(lines)}",
            NestorWarning,
            stacklevel=4,
        )


def _listed(lines: Sequence[str]) -> str:
    left = len(lines) - _SHOWN
    return "\n".join(f"  {line}" for line in (*lines[:_SHOWN], *([f"and {left} more"] if left > 0 else [])))


def _differences(saved: Any, own: Any, place: str = "") -> Iterator[str]:
    """Describe each difference of two trees of plain data in a line."""
    if isinstance(saved, dict) and isinstance(own, dict):
        if place == "levels":
            if list(saved) != list(own):
                yield f"levels: {', '.join(saved)} in the checkpoint, {', '.join(own)} here"
                return
            saved, own = ({f"level {name!r}": part for name, part in one.items()} for one in (saved, own))
            place = ""
        for name in dict.fromkeys((*saved, *own)):
            yield from _differences(saved.get(name), own.get(name), f"{place}, {name}" if place else name)
    elif (
        isinstance(saved, list)
        and isinstance(own, list)
        and len(saved) == len(own)
        and any(isinstance(part, dict) for part in saved)
    ):
        for index, parts in enumerate(zip(saved, own, strict=True)):
            yield from _differences(*parts, f"{place} {index}")
    elif saved != own:
        yield f"{place}: {_said(saved)} in the checkpoint, {_said(own)} here"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _structure(level: Level) -> dict[str, Any]:
    problem, links = level.problem, level.links
    spec = level.response.history_spec if links.upper_levels else None
    return {
        "variables": {name: _kind(tensor) for name, tensor in zip(level.names, level.parameters, strict=True)},
        "constants": {n: _kind(p) for n, p in problem.module.named_parameters() if n not in level.names},
        "buffers": {name: _kind(buffer) for name, buffer in problem.module.named_buffers()},
        "optimizer": None if problem.optimizer is None else name_of(type(problem.optimizer)),
        "groups": None if problem.optimizer is None else _group_sizes(problem.optimizer),
        "update": problem.update is not None,
        "scheduler": None if problem.scheduler is None else name_of(type(problem.scheduler)),
        "response": _classes(level.response) if links.upper_levels else None,
        "history": None if spec is None else _plain(replace(spec, offload_to=None)),
        "lowers": list(links.lower_levels),
        "uppers": list(links.upper_levels),
        "unroll_steps": problem.unroll_steps,
        "accumulate": problem.accumulate,
        "tasks": problem.tasks,
        "init": problem.init,
    }


def _settings(level: Level) -> dict[str, Any]:
    problem = level.problem
    groups = problem.optimizer.param_groups if problem.optimizer is not None else []
    return {
        "module": name_of(type(problem.module)),
        "loss": getattr(problem.loss, "__qualname__", name_of(type(problem.loss))),
        "hyperparameters": [{k: _plain(v) for k, v in group.items() if k != "params"} for group in groups],
        "response": _plain(level.response) if level.links.upper_levels else None,
        "warmup_steps": problem.warmup_steps,
        "clip_norm": _plain(problem.clip_norm),
        "precision": problem.precision,
        "data": None if problem.data is None else name_of(type(problem.data)),
        "batches": _length(problem.data),
    }


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _group_sizes(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _classes(value: Any) -> str:
    """Name the class of a response, and the classes of its parts: a state of one is no state of the other."""
    parts = [_classes(getattr(value, f.name)) for f in fields(value)] if is_dataclass(value) else []
    named = [part for part in parts if part]
    own = type(value).__name__ if is_dataclass(value) else ""
    return f"{own}({', '.join(named)})" if named else own


def _length(data: Any) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a DataLoader of an IterableDataset
        return None


def _plain(value: Any) -> Any:
    """Convert a setting to JSON: numbers and strings as they are, sequences as lists, anything else by its name."""
    if isinstance(value, Tensor):
        return _plain(value.item()) if value.numel() == 1 else _kind(value)
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, nn.Module) or callable(value):
        return getattr(value, "__qualname__", name_of(type(value)))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
