"""The total derivative of an objective: its direct part, and the parts that come through best responses."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nestor.autodiff.grad import accumulate
from nestor.errors import NestorError
from nestor.levels.level import Level
from nestor.levels.nesting import BestResponse
from nestor.vectors import algebra


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
        if all(c is None for c in cotangent):
            continue
        try:
            found = response.pull_back(cotangent)
        except NestorError as error:
            error.add_note(f"While differentiating the objective of level {level.name!r}, loss {level.loss.where}.")
            raise
        for name, grads in found.items():
            known[name] = accumulate(known[name], grads) if known.get(name) else grads
    indirect = known[level.name]
    if all(value is None for value in indirect):
        return direct, 0.0
    if all(value is None for value in direct):
        return indirect, 1.0
    norms = [level.space.norm(algebra.present(part)) for part in (direct, indirect)]
    share = norms[1] / (norms[0] + norms[1]).clamp_min(_SMALLEST)
    return accumulate(direct, indirect), share


# Avoids 0 / 0 where both parts are zero.
_SMALLEST = 1e-30
