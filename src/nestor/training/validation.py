"""Validation during a run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nestor.data.draws import VALIDATION
from nestor.data.random_numbers import Seeded, Watch
from nestor.data.seeds import mix
from nestor.distributed import Runtime
from nestor.errors import note
from nestor.errors.options import is_integer
from nestor.levels.copies import copies_of_tasks
from nestor.levels.level import Level
from nestor.levels.signatures import location
from nestor.training.checks import validation_arguments


class Validation:
    """Calls the user's ``validate`` with modules in eval mode.

    Args:
        validate: ``validate(level, ...)``, which returns a mapping of scalars, or one scalar; None: no validation. A
            level with tasks is passed as the list of its copies, one for each task.
        every: Engine steps between two validations; 0 validates at the end of a run only.
        levels: The levels of the program.
        runtime: Averages the results over processes.

    Attributes:
        latest: The metrics of the last validation.

    Raises:
        ValueError: If ``every`` is negative, or an argument of ``validate`` names no level.
    """

    def __init__(
        self, validate: Callable[..., Any] | None, every: int, levels: Mapping[str, Level], runtime: Runtime
    ) -> None:
        if not is_integer(every) or every < 0:
            raise ValueError(f"Engine(validate_every={every!r}) must be an integer of at least 0.")
        if every and validate is None:
            raise ValueError(f"Engine(validate_every={every}) has nothing to call: give validate=...")
        self.every = every
        self.validate = validate
        self.latest: dict[str, float] = {}
        self._arguments = validation_arguments(validate, levels)
        self._levels = levels
        self._runtime = runtime

    def run(self, seed: int, step: int) -> dict[str, float]:
        """Validate; return the metrics, averaged over processes."""
        assert self.validate is not None
        modes = {m: m.training for level in self._levels.values() for m in level.problem.module.modules()}
        for module in modes:
            module.training = False
        try:
            Seeded(mix(seed, len(self._levels), VALIDATION, step)).replay(Watch(used=True))
            with torch.no_grad(), self._runtime.whole_modules():
                result = self.validate(**{name: _validated(self._levels[name]) for name in self._arguments})
        except Exception as error:
            note(error, f"validate {location(self.validate)}, step {step}")
            raise
        finally:
            for module, training in modes.items():
                module.training = training
        metrics = result if isinstance(result, Mapping) else {"value": result}
        self._runtime.compare("a validation", {"the metrics": ", ".join(map(str, metrics)), "the step": step})
        numbers = {key: float(value) for key, value in metrics.items()}
        self.latest = dict(zip(numbers, self._runtime.mean(list(numbers.values())), strict=True))
        return self.latest


def _validated(level: Level) -> Any:
    """Return the module of a level, or the copies of a level with tasks, which are in eval mode as the module is."""
    return level.problem.module if level.problem.tasks is None else copies_of_tasks(level)
