"""Value-function penalties: F2SA and PBGD."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nestor.errors.options import check_options
from nestor.problem import Problem, Reformulation
from nestor.reformulations.pair import Pair, PairedBatches


@dataclass(frozen=True, kw_only=True)
class ValuePenalty(Reformulation):
    r"""Penalize the lower level's distance from its minimum, with a multiplier that grows.

    .. math:: \theta \approx \arg\min_\theta \tfrac1\gamma F(\lambda, \theta) + G(\lambda, \theta), \qquad
        z \approx \arg\min_z G(\lambda, z), \qquad
        \frac{d}{d\lambda} \approx \nabla_\lambda F(\lambda, \theta)
        + \gamma \big(\nabla_\lambda G(\lambda, \theta) - \nabla_\lambda G(\lambda, z)\big)

    The error of the hypergradient is of order :math:`1/\gamma`. ``theta`` is the level's own module; ``z`` is a copy,
    the level ``<name>_value``. Both take ``unroll_steps`` steps of the level's optimizer between two upper steps, from
    where they ended before (warm start). The memory of the lower level doubles.

    A batch of the level and of the upper level is ``(lower batch, upper batch, multiplier)``. The copy takes the
    level's own batches, or such triples if ``scaled=False``.

    Args:
        multiplier: :math:`\gamma` at the first upper step.
        growth: Added to :math:`\gamma` after every upper step.
        most: Largest :math:`\gamma`.
        scaled: True: the lower level minimizes ``F / gamma + G``, so that its learning rate need not change as
            :math:`\gamma` grows (F2SA). False: it minimizes ``F + gamma G``, and the copy ``gamma G`` (PBGD).

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.05) for variable in (low, top)]
        >>> penalty = nestor.ValuePenalty(multiplier=1.0, growth=0.1)
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0], reformulation=penalty)
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> list(program.levels)  # the copy is a level of its own
        ['low_value', 'low', 'top']
    """

    multiplier: float = 1.0
    growth: float = 0.1
    most: float = 1e4
    scaled: bool = True

    def __post_init__(self) -> None:
        check_options(self, tolerances=["growth"], positive=["multiplier"])
        if not self.most >= self.multiplier:
            raise ValueError(f"most={self.most} must be at least multiplier={self.multiplier}.")

    def at(self, step: int) -> float:
        """Return the multiplier after ``step`` upper steps."""
        return min(self.multiplier + self.growth * step, self.most)

    def rewrite(self, name: str, problems: Mapping[str, Problem]) -> dict[str, Problem]:
        """Add a copy of the lower level, and penalize the difference of the values of the two in the upper loss."""
        pair = Pair.of(self, name, problems)
        lower, upper = pair.lower, pair.upper

        def penalized(batch: Any, modules: Mapping[str, Any]) -> Tensor:
            objective, inner = pair.evaluate_upper(batch, modules), pair.evaluate_lower(batch, modules)
            multiplier: float = batch[2]
            return objective / multiplier + inner if self.scaled else objective + multiplier * inner

        def difference(batch: Any, modules: Mapping[str, Any]) -> dict[str, Tensor]:
            objective, gap = pair.evaluate_upper(batch, modules), pair.gap(batch, modules)
            return {"loss": objective + batch[2] * gap, "upper": objective, "gap": gap, "multiplier": batch[2]}

        data = PairedBatches(lower.data, upper.data, self.at, lower.unroll_steps * lower.accumulate)
        upper_data = PairedBatches(lower.data, upper.data, self.at, upper.accumulate)
        return pair.replaced(
            copied={"loss": pair.copied_loss(scaled=not self.scaled), "data": lower.data if self.scaled else data},
            lower={"loss": pair.loss(penalized), "data": data},
            upper={"loss": pair.loss(difference, pair.copy_name), "data": upper_data},
        )

    def describe(self) -> str:
        """Name the method and its multiplier."""
        grows = f" + {self.growth:g} a step" if self.growth else ""
        return f"{'F2SA' if self.scaled else 'PBGD'}(multiplier={self.multiplier:g}{grows})"


def F2SA(*, multiplier: float = 1.0, growth: float = 0.1, most: float = 1e4) -> ValuePenalty:
    r"""F2SA: a fully first-order method with two lower copies and a multiplier that grows.

    See :class:`ValuePenalty` for the formula and the arguments.

    Reference: Kwon, Kwon, Wright, Nowak, A fully first-order method for stochastic bilevel optimization, ICML 2023.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.05) for variable in (low, top)]
        >>> f2sa = nestor.F2SA()
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0], reformulation=f2sa)
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> metrics = nestor.Engine(program, seed=0).run(300)
        >>> print(f"{top().item():.1f}")  # the optimum is 1
        1.0
    """
    return ValuePenalty(multiplier=multiplier, growth=growth, most=most)


def PBGD(*, multiplier: float = 10.0) -> ValuePenalty:
    r"""V-PBGD: a constant multiplier; the lower level minimizes ``F + gamma G``.

    The learning rate of the lower level must be small compared with :math:`1/\gamma`. See :class:`ValuePenalty`.

    Reference: Shen and Chen, On penalty-based bilevel gradient descent method, ICML 2023, algorithm 1.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.02) for variable in (low, top)]
        >>> pbgd = nestor.PBGD(multiplier=5.0)
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0], reformulation=pbgd)
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> metrics = nestor.Engine(program, seed=0).run(600)
        >>> print(f"{top().item():.1f}")  # the optimum is 1
        1.0
    """
    return ValuePenalty(multiplier=multiplier, growth=0.0, most=multiplier, scaled=False)
