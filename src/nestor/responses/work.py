"""How often a response evaluates a level."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """The evaluations of a level's objective in one pullback through the level's response.

    Attributes:
        gradients: Number of gradients of the objective.
        passes: 2 if each gradient is differentiated, 1 if it is only evaluated.
        products: Largest number of products with the matrix of a linear system.
        is_shared: Whether the products use the graph of the gradient that is differentiated.
    """

    gradients: int = 1
    passes: int = 2
    products: int = 0
    is_shared: bool = False
