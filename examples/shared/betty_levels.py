"""Betty's problems and engine from losses that are written as nestor's are: both libraries run the same losses."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logging.disable(logging.INFO)


class BettyLevel(ImplicitProblem):
    """A problem of Betty whose loss reads its own module, and those of other levels, as arguments by name.

    Args:
        name: Of the level, as the losses call it.
        module: With the variables.
        loss: A function of the batch and of modules.
        optimizer: Of the module's parameters.
        data: Batches.
        config: The response of the level, and its number of steps between two of the levels above.
        scheduler: Of the learning rate.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss: Callable[..., Tensor],
        *,
        optimizer: Optimizer,
        data: Iterable,
        config: Config | None = None,
        scheduler: LRScheduler | None = None,
    ) -> None:
        options = {"module": module, "optimizer": optimizer, "scheduler": scheduler, "train_data_loader": data}
        super().__init__(name, config or Config(), **options)
        self.loss = loss
        self.reads = [argument for argument in inspect.signature(loss).parameters if argument != "batch"]

    def training_step(self, batch) -> Tensor:
        """Return the loss at the modules of the levels that it reads."""
        levels = {name: self if name == self.name else getattr(self, name) for name in self.reads}
        return self.loss(batch, **{name: level.module for name, level in levels.items()})


def betty_engine(levels: Sequence[BettyLevel], steps: int) -> Engine:
    """Return an engine for a number of steps of the lowest level; who depends on whom follows from the losses.

    Args:
        levels: Lowest first.
        steps: Of the lowest level.
    """
    up_to_low: dict[BettyLevel, list[BettyLevel]] = {}
    low_to_up: dict[BettyLevel, list[BettyLevel]] = {}
    for place, lower in enumerate(levels):
        for upper in levels[place + 1 :]:
            if upper.name in lower.reads:
                up_to_low.setdefault(upper, []).append(lower)
            if lower.name in upper.reads:
                low_to_up.setdefault(lower, []).append(upper)
    config = EngineConfig(train_iters=steps, valid_step=steps + 1, strategy="cpu")
    return Engine(problems=list(levels), config=config, dependencies={"u2l": up_to_low, "l2u": low_to_up})


def run_betty(levels: Sequence[BettyLevel], steps: int, seed: int) -> None:
    """Train the modules of the levels in place."""
    torch.manual_seed(seed)
    betty_engine(levels, steps).run()
