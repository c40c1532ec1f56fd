"""Which levels cannot be compiled, as far as it is known before tracing."""

from torch.optim import Optimizer

from nestor.autodiff.torch_private import hooks_of
from nestor.optim.stepper import is_of_torch
from nestor.training.level_state import LevelState


def unsuitable(state: LevelState) -> str | None:
    """Return the reason why the level's step cannot be compiled, if the reason is known before tracing."""
    level, loss = state.level, state.level.loss
    if loss.placements is not None:
        return "its steps are those of several processes"
    if loss.precision is not None:
        return "its losses run in half precision"
    if level.stepping.optimizer is not None and hooks_of(level.stepping.optimizer, Optimizer):
        return "its optimizer has step hooks"
    if (own := level.stepping.optimizer) is not None and not is_of_torch(own):
        return f"{type(own).__name__} is not one of torch.optim, and a graph reads no attributes"
    return None
