"""The derivative of a loss, and the total derivative of an objective, with the parts that come through responses."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nestor.autodiff.derivatives import is_final
from nestor.autodiff.grad import accumulate, grad, scaled_grad
from nestor.autodiff.instruments import count_gradient
from nestor.errors import LossError, NestorError
from nestor.levels.level import Level
from nestor.levels.nesting import BestResponse
from nestor.vectors import Params, algebra


def pull_back(
    level: Level,
    below: Sequence[BestResponse],
    direct: list[Tensor | None],
    cotangents: Mapping[str, list[Tensor | None]],
) -> tuple[list[Tensor | None], float | Tensor]:
    r"""Pull the cotangents back through the responses, each one once, in reverse, and add them to the direct part.

    Returns:
        The total derivative, and the share of it that comes through responses,
        :math:`|\text{indirect}| / (|\text{direct}| + |\text{indirect}|)`. The share is the number 0.0 if no response
        depends on the level's variables, and the number 1.0 if the loss depends on them through responses only.
    """
    indirect: list[Tensor | None] = []
    known = {level.name: indirect, **cotangents}
    for response in reversed(below):
        cotangent = known.pop(response.node.level.name, [])
        if algebra.is_zero(cotangent):
            continue
        try:
            found = response.pull_back(cotangent)
        except NestorError as error:
            error.add_note(f"While differentiating the objective of level {level.name!r}, loss {level.loss.where}.")
            raise
        for name, grads in found.items():
            known[name] = accumulate(known[name], grads) if known.get(name) else grads
    indirect = known[level.name]
    if algebra.is_zero(indirect):
        return direct, 0.0
    if algebra.is_zero(direct):
        return indirect, 1.0
    norms = [level.space.norm(algebra.present(part)) for part in (direct, indirect)]
    share = norms[1] / (norms[0] + norms[1]).clamp_min(_SMALLEST)
    return accumulate(direct, indirect), share


# Avoids 0 / 0 where both parts are zero.
_SMALLEST = 1e-30


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
    scaling = level.loss.scaling
    try:
        if scaling is None:
            return grad([loss], wrt, create_graph=create_graph)
        return scaled_grad(loss, wrt, scaling.scale, create_graph=create_graph)
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
        grad([loss], wrt)
    except Exception:
        return False
    return True
