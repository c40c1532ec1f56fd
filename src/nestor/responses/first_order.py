"""The response of a level that is a constant for the levels above."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from nestor.errors.options import check_options
from nestor.responses.response import Response
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.vectors import Params


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Response):
    r"""Take :math:`d\theta^*/d\lambda = 0`: the level is a constant for the levels above, which keep their direct term.

    A level that starts from the variables of another level (``Problem(init=...)``) passes its cotangent on to these
    variables unchanged: first-order MAML. An upper level whose loss does not read its own variables gets no gradient
    through this response, which ``Program`` reports as an error.

    Args:
        through_init: Whether the cotangent is passed on to the variables that the level started from. False also
            leaves out this part: a reformulation, whose losses contain the derivative of the lower level, sets it.
        label: The name in tables; if it is empty, tables show ``FirstOrder``.

    Reference: Finn, Abbeel, Levine, Model-agnostic meta-learning, ICML 2017, section 5.2.

    Example:
        >>> low, top = nestor.Variable(torch.tensor(1.0)), nestor.Variable(torch.tensor(2.0))
        >>> program = nestor.Program(
        ...     low=nestor.Problem(low, lambda low, top: (low() - top()) ** 2, response=nestor.FirstOrder()),
        ...     top=nestor.Problem(top, lambda top, low: top() ** 2 + 100 * low()),
        ... )
        >>> program.hypergradient("top")  # the direct term alone
        {'value': tensor(4.)}
    """

    differentiable: ClassVar[bool] = False
    through_init: bool = True
    label: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def differentiates_twice(self) -> bool:
        """False: the loss is not differentiated."""
        return False

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Return zero, except for the variables that the level started from."""
        grads: list[Tensor | None] = [None] * len(inputs)
        if self.through_init and lower.init_indices is not None:
            # The cotangents of tasks that start from the same variables add up.
            for place, value in zip(lower.init_indices, cotangent, strict=True):
                grads[place] = value.sum_to_size(inputs[place].shape)
        return grads

    def describe(self) -> str:
        return self.label or "FirstOrder"

    def work(self, steps: int, dimension: int) -> Work:
        return Work(gradients=0)
