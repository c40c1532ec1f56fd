"""BOME: the value-function constraint, approached by a dynamic barrier."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestor.errors.options import check_options
from nestor.problem import Problem, Reformulation
from nestor.reformulations.pair import Pair, PairedBatches
from nestor.vectors import LOCAL, algebra


@dataclass(frozen=True, kw_only=True)
class BOME(Reformulation):
    r"""Descend on ``F + gamma q``, with a multiplier that is computed from the gradients of ``F`` and ``q``.

    .. math:: q(\lambda, \theta) = G(\lambda, \theta) - G(\lambda, \theta_T), \qquad
        (\lambda, \theta) \leftarrow (\lambda, \theta) - \xi (\nabla F + \gamma \nabla q), \qquad
        \gamma = \max\Big(0, \eta - \frac{\langle\nabla F, \nabla q\rangle}{\lVert\nabla q\rVert^2}\Big)

    :math:`\theta_T` is a copy, the level ``<name>_value``: it starts from :math:`\theta` and takes the level's
    ``unroll_steps`` steps on ``G``. Then :math:`\theta` and the upper level take one step each, with their own
    optimizers and with :math:`\gamma` from the gradients at that point. With constant learning rates the iterates end
    near the optimum, not at it (on a small quadratic 9 % off, less with smaller rates). Computing :math:`\gamma` takes
    two more gradients a step.

    A batch of the level and of the upper level is ``(lower batch, upper batch, 0.0)``; the copy takes the level's own.

    Args:
        eta: :math:`\eta`, the rate at which the constraint ``q <= 0`` is approached.

    Raises:
        ValueError: If ``eta`` is not positive.

    Reference: Liu, Ye, Wright, Stone, Liu, BOME! Bilevel optimization made easy, NeurIPS 2022, equations 6 and 7.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.05) for variable in (low, top)]
        >>> bome = nestor.BOME()
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0], reformulation=bome)
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> metrics = nestor.Engine(program, seed=0).run(300)
        >>> print(f"{top().item():.1f}")  # the optimum is 1
        1.0
    """

    eta: float = 0.5

    def __post_init__(self) -> None:
        check_options(self, positive=["eta"])

    def rewrite(self, name: str, problems: Mapping[str, Problem]) -> dict[str, Problem]:
        """Add a copy that takes the lower steps, and give both levels one loss."""
        pair = Pair.of(self, name, problems)
        upper_name = pair.upper_loss.level

        def barrier(batch: Any, modules: Mapping[str, Any]) -> dict[str, Tensor]:
            objective, gap = pair.evaluate_upper(batch, modules), pair.gap(batch, modules)
            joint = [p for level in (name, upper_name) for p in modules[level].parameters() if p.requires_grad]
            multiplier = self.multiplier(objective, gap, joint)
            return {"loss": objective + multiplier * gap, "upper": objective, "gap": gap, "multiplier": multiplier}

        joint_level = {
            "loss": pair.loss(barrier, pair.copy_name, upper_name),
            "data": PairedBatches(pair.lower.data, pair.upper.data, _no_multiplier),
        }
        return pair.replaced(
            copied={"loss": pair.copied_loss(), "init": name},
            lower={**joint_level, "unroll_steps": 1},
            upper=joint_level,
        )

    def multiplier(self, upper: Tensor, gap: Tensor, joint: list[Tensor]) -> Tensor:
        """Compute the multiplier from the gradients of the upper loss and the gap in both levels' parameters."""
        if not torch.is_grad_enabled():
            return torch.zeros_like(upper)
        descent, constraint = (
            algebra.zeros_for_none(torch.autograd.grad(f, joint, retain_graph=True, allow_unused=True), joint)
            for f in (upper, gap)
        )
        square = LOCAL.dot(constraint, constraint)
        # The inner `where` keeps the quotient finite where the outer one discards it.
        ratio = LOCAL.dot(descent, constraint) / torch.where(square == 0, 1.0, square)
        return torch.where(square == 0, 0.0, torch.clamp(self.eta - ratio, min=0.0)).detach()

    def describe(self) -> str:
        """Name the method."""
        return f"BOME(eta={self.eta:g})"


def _no_multiplier(step: int) -> float:
    """Return the third entry of a batch, which is not used: the loss of BOME computes the multiplier."""
    return 0.0
