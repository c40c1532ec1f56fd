"""What evaluations of a level read beside tensors: a graph would freeze it at compile time."""

from nestor.compilation.arguments import Unsuitable
from nestor.levels.level import Level


def check_constant(level: Level) -> None:
    """Check that the level reads nothing from outside that changes from step to step.

    Raises:
        Unsuitable: If the level reads something that a graph would freeze.
    """
    if level.takes_step:
        raise Unsuitable(f"level {level.name!r} reads the number of its steps ('step'), which a graph would freeze")
    if (constants := level.loss.reader.constants) is not None:
        constants.look()
        if constants.moving:
            raise Unsuitable(f"tensors move that the loss of level {level.name!r} reads and that no level owns")
    if level.loss.reader.watch.used:
        raise Unsuitable(
            f"the loss of level {level.name!r} draws random numbers from Python or numpy, which a graph would freeze"
        )
