"""Vectors of parameter space: sequences of tensors, one for each parameter."""

from nestor.vectors import algebra
from nestor.vectors.algebra import InputLayout, Params, split
from nestor.vectors.space import LOCAL, VectorSpace
from nestor.vectors.structure import Tree, flatten, unflatten

__all__ = ["LOCAL", "InputLayout", "Params", "Tree", "VectorSpace", "algebra", "flatten", "split", "unflatten"]
