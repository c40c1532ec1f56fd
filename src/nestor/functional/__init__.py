"""The functional core: best responses, roots and fixed points as differentiable functions, without a program."""

from nestor.functional.best_response import best_response
from nestor.functional.root import fixed_point, root

__all__ = ["best_response", "fixed_point", "root"]
