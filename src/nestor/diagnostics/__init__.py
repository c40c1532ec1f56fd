"""Diagnostics: measurements of a program that do not change it.

Example:
    >>> low = nestor.Problem(nestor.Variable(torch.ones(())), lambda low, top: (low() - top()) ** 2)
    >>> top = nestor.Problem(nestor.Variable(torch.ones(())), lambda low: low() ** 2)
    >>> program = nestor.Program(low=low, top=top)
    >>> nestor.diagnostics.check_loss(program, "low")  # no error: it is a function
"""

from nestor.autodiff.instruments import Evaluations
from nestor.diagnostics.check_hypergradient import Comparison, Trial, check_hypergradient
from nestor.diagnostics.check_loss import check_loss
from nestor.diagnostics.count_evaluations import count_evaluations

__all__ = ["Comparison", "Evaluations", "Trial", "check_hypergradient", "check_loss", "count_evaluations"]
