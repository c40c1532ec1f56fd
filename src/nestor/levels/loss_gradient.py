"""The gradient of a value of a level's loss, and its errors."""

from torch import Tensor

from nestor.autodiff.derivatives import is_final
from nestor.autodiff.grad import scaled_grad
from nestor.autodiff.instruments import count_gradient
from nestor.errors import LossError
from nestor.levels.level import Level
from nestor.vectors import Params


def loss_gradient(level: Level, loss: Tensor, wrt: Params, *, create_graph: bool = False) -> list[Tensor | None]:
    """Differentiate a value of the level's loss.

    Raises:
        LossError: If the loss has no graph, if a variable was frozen after the program was built, or, with
            ``create_graph``, if an operation has no second derivative.
    """
    if not loss.requires_grad:
        raise LossError(
            f"The loss does not depend on the variables of {level.name!r} or of a level below: it has no graph. Is "
            "it computed under no_grad, detached, or from .item() or numpy values?",
            level=level.name,
            where=level.loss.where,
        )
    count_gradient(level.name)
    if create_graph and level.loss.reader.only_once:
        raise level.loss.reader.only_once[0]()
    try:
        return scaled_grad(loss, wrt, level.loss.scale, create_graph=create_graph)
    except (RuntimeError, NotImplementedError) as error:
        if create_graph and not is_final(error) and _has_gradient(level, loss, wrt):
            raise level.derivatives.missing_error(level.name, level.response.describe(), error) from error
        if all(t.requires_grad for t in wrt):
            raise
    frozen = [name for name, p in zip(level.names, level.parameters, strict=True) if not p.requires_grad]
    raise LossError(
        f"{', '.join(map(repr, frozen)) or 'A variable of a level below'} does not require a gradient: it was frozen "
        "after the program was built. Call requires_grad_(True), or build a new Program, with an optimizer of the "
        "parameters that are left.",
        level=level.name,
        where=level.loss.where,
    )


def _has_gradient(level: Level, loss: Tensor, wrt: Params) -> bool:
    try:
        scaled_grad(loss, wrt, level.loss.scale)
    except Exception:
        return False
    return True
